import json
import math
import shlex
import time

import pytest
import torch
import torch.nn.functional as F

from autolr_fast import FACTORS_3, FACTORS_7, AutoLR, Rule
from benchmarks.paper import __main__ as paper
from benchmarks.paper import train
from benchmarks.paper.data import CIFAR_10, Batches, load_dataset, name_of, suffix_of
from benchmarks.paper.experiments import EXPERIMENTS, SOURCE, arguments
from benchmarks.paper.models import ResNet18
from benchmarks.paper.report import Report
from benchmarks.paper.rules import RULES
from benchmarks.paper.runner import Planned, is_finished, run_missing
from benchmarks.paper.summary import summarize

from .test_paper_train import rows_of, write_shard


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A directory with a training shard of 40 images and a test shard of 10."""
    directory = tmp_path_factory.mktemp("images")
    write_shard(directory / "train-0.parquet", 40, seed=1)
    write_shard(directory / "test-0.parquet", 10, seed=2)
    return directory


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def digest(images, cache):
    return load_dataset(images, cache).digest


@pytest.fixture
def places(images, cache, tmp_path):
    """Where ``python -m benchmarks.paper`` reads and writes."""
    return [
        *("--data", str(images), "--cache", str(cache), "--device", "cpu", "--scale", "toy"),
        *("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")),
    ]


def probes_of(out):
    return [row["probe"] for row in rows_of(out) if "probe" in row]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pool(images, cache):
    """All the images to train on, as one batch."""
    data = load_dataset(images, cache)
    return Batches(data.train_images[:24], data.train_labels[:24], 24, seed=0, augment=False)


@pytest.fixture
def run(images, cache, tmp_path):
    """Train for two epochs of three steps of 8 images with AutoLR.paper; return the rows of the log."""

    def build(*more):
        places = ["--data", str(images), "--cache", str(cache), "--out", str(tmp_path / "run"), "--device", "cpu"]
        sizes = ["--width", "2", "--batch-size", "8", "--validation", "8", "--limit", "24", "--no-augment"]
        train.main([*places, *sizes, "--scheduler", "paper", "--epochs", "2", *more])
        return rows_of(tmp_path / "run")

    return build


# What a run may be asked for


@pytest.mark.parametrize(
    ("more", "kept", "drawn"),
    [
        ([], 8, 0),
        (["--score-batch-size", "3"], 3, 0),
        (["--score-batch-size", "20"], 8, 12),
        (["--score-batch", "independent"], 0, 8),
        (["--score-batch", "independent", "--score-batch-size", "20"], 0, 20),
    ],
)
def test_a_probe_is_scored_on_the_images_asked_for(run, pool, more, kept, drawn):
    seen = []
    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if isinstance(module, ResNet18) else None
    ):
        run(*more, "--steps", "1", "--evaluator", "inplace")
    trained, *scored = seen[:4]
    for x in scored:  # one for each factor, and the same images for all
        assert len(x) == kept + drawn
        assert torch.equal(x, scored[0])
        assert torch.equal(x[:kept], trained[:kept])
    known, _ = pool.batch(0)
    places = [next(i for i, image in enumerate(known) if torch.equal(image, x)) for x in scored[0][kept:]]
    assert len(set(places)) >= min(drawn, 4)


def test_drawn_images_come_with_their_labels_and_depend_on_the_step_alone():
    pixels = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 4)
    batches = Batches(pixels, torch.arange(12), batch_size=4, seed=0, augment=False)
    images, labels = batches.random_batch(5, 64)
    assert torch.equal(images, batches.normalize(pixels[labels]))
    assert set(labels.tolist()) == set(range(12))
    batches.batch(3)
    assert torch.equal(batches.random_batch(5, 64)[1], labels)
    assert not torch.equal(batches.random_batch(6, 64)[1], labels)


@pytest.mark.parametrize(
    ("more", "count"),
    [
        (["--scheduler", "auto"], 6),
        ([], 6),
        (["--score-batch", "independent"], 0),
        (["--score-batch-size", "4"], 0),
        (["--scheduler", "constant"], 0),
    ],
)
def test_losses_of_training_go_through_autolr_if_it_judges_by_them(run, monkeypatch, more, count):
    seen = []
    loss = AutoLR.loss
    monkeypatch.setattr(AutoLR, "loss", lambda self, closure: seen.append(loss(self, closure)) or seen[-1])
    rows = run(*more)
    assert len(seen) == count
    assert [each.item() for each in seen] == [row["loss"] for row in rows if row["kind"] == "step"][:count]


def test_autolr_has_a_rule_where_one_is_asked_for(run, tmp_path):
    more = ["--scheduler", "auto", "--calibrate", "0", "--every", "2", "--epochs", "6"]
    heat = [row["probe"] for row in run(*more) if "probe" in row]
    assert [probe["factors"] for probe in heat] == [[2 / 3, 1.0]] * 3  # a mean of parameters, and the newer ones
    (tmp_path / "run" / "checkpoint.pt").unlink()
    ruled = [row["probe"] for row in run(*more, "--factors", "3") if "probe" in row]
    assert [probe["factors"] for probe in ruled] == [list(FACTORS_3)] * 4


def test_probes_come_once_an_epoch(run):
    assert [row["step"] for row in run("--every", "epoch") if "probe" in row] == [3, 6]


def test_the_first_steps_are_calibrated(run):
    rows = run("--calibrate", "2", "--every", "5", "--factors", "wide")
    probes = [row["probe"] for row in rows if "probe" in row]
    assert [probe["step"] for probe in probes] == [1, 2, 5]
    found = probes[0]["lr_before"] * probes[0]["factor"]
    assert probes[0]["lr_after"] == pytest.approx(found / 3)  # where calibration has the next step start
    assert probes[2]["factors"] == [64, 16, 4, 1, 1 / 4, 1 / 16, 1 / 64]


def test_a_fresh_gradient_is_another_direction(run, images, cache):
    (probe,) = (row["probe"] for row in run("--steps", "1", "--direction", "gradient") if "probe" in row)
    data = load_dataset(images, cache)
    x, y = Batches(data.train_images[:24], data.train_labels[:24], 8, seed=0, augment=False).batch(0)
    torch.manual_seed(0)
    model = ResNet18(3, width=2)
    parameters = list(model.parameters())

    def gradients():
        return torch.autograd.grad(F.cross_entropy(model(x), y), parameters)

    def move(by, gradients):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= by * gradient

    move(0.005, gradients())
    fresh, losses = gradients(), []
    for factor in probe["factors"]:
        move(0.005 * factor, fresh)
        losses.append(F.cross_entropy(model(x), y).item())
        move(-0.005 * factor, fresh)
    assert probe["losses"] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("minmax", [1, math.exp(-1), math.exp(-0.5)]),
        ("zscore", [math.exp(1.5**0.5), math.exp(-(1.5**0.5)), 1]),
        ("sum", [math.exp(-1 / 6), math.exp(-3 / 6), math.exp(-2 / 6)]),
        ("rank", [1, math.exp(-1), math.exp(-0.5)]),
        ("softmax-0.1", [1, math.exp(-20), math.exp(-10)]),
        ("softmax-0.01", [1, math.exp(-200), math.exp(-100)]),
        ("improvement", [2 / 3, 0.01, 1 / 3]),
    ],
)
def test_a_score_weighs_losses_by_its_formula(name, weights):
    """Losses 1, 3, 2, of which 3 is the unscaled step's: their mean is 2, their deviation (2/3)^(1/2)."""
    normalize, score = RULES[name]
    rule = Rule(FACTORS_3, score, normalize)
    weighed, _ = rule.weigh(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    assert weighed.tolist() == pytest.approx([weight / sum(weights) for weight in weights])


# What is kept of a run


def write_log(out, *rows):
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


HEADER = {
    **{"kind": "header", "command": shlex.join(train.COMMAND), "versions": {"torch": "1"}, "device": "x86_64"},
    **{
        "threads": 1,
        "data": CIFAR_10,
        "parameters": 5,
        "train_images": 4,
        "validation_images": 2,
        "test_images": 2,
    },
    **{"steps_per_epoch": 2, "total_steps": 4},
}


def step(number, lr, loss, factor=None, losses=None):
    row = {"kind": "step", "step": number, "lr": lr, "loss": loss}
    return row if factor is None else row | {"probe": {"factor": factor, "losses": losses}}


def evaluation(kind, number, loss, accuracy):
    spent = {"seconds": {"training": 2.0, "probing": 1.0, "evaluating": 0.5}, "memory": 2**20}
    return {"kind": kind, "step": number, "loss": loss, "accuracy": accuracy, **spent}


def finished_log(accuracy=0.5):
    return [
        HEADER,
        step(1, 1.0, 3.0, factor=2.0, losses=[1.0, 1.5, 3.0]),
        step(2, 4.0, 1.0, factor=0.5, losses=[1.0, 1.1, 1.2]),
        evaluation("validation", 2, 2.5, 0.25),
        step(3, 2.0, None, factor=0.25, losses=[None, 7.0, 1.0]),
        step(4, 0.5, 2.0, factor=1.0, losses=[1.0, 1.0, 1.0]),
        evaluation("validation", 4, 2.0, 0.5),
        evaluation("test", 4, 1.75, accuracy),
    ]


def test_a_summary_is_what_the_log_says(tmp_path):
    write_log(tmp_path, *finished_log())
    row = summarize(tmp_path / "log.jsonl")
    assert row["curve"] == [
        {
            **{"epoch": 1.0, "validation_loss": 2.5, "validation_accuracy": 0.25},
            **{"training_loss": 2.0, "lr": pytest.approx(2.0)},
        },
        {
            **{"epoch": 2.0, "validation_loss": 2.0, "validation_accuracy": 0.5},
            **{"training_loss": None, "lr": pytest.approx(1.0)},
        },
    ]
    assert (row["test_accuracy"], row["test_loss"]) == (0.5, 1.75)
    assert (row["highest_loss"], row["not_finite"]) == (3.0, True)
    assert (row["seconds"]["probing"], row["memory"]) == (1.0, 2**20)
    # Of the probes that saw a loss each: |log2 factor| 1, 1, 0 and ranges 2, 0.2, 0. Ranks 1.5, 1.5, 0 and 2, 1, 0.
    assert (row["probes"], row["move"]) == (4, pytest.approx(2 / 3))
    assert row["follows_range"] == pytest.approx(3**0.5 / 2)
    assert row["parameters"] == 5


def test_a_run_without_probes_has_no_reaction(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "probe"} for row in finished_log()]
    write_log(tmp_path, *rows)
    assert "move" not in summarize(tmp_path / "log.jsonl")


def test_a_run_is_finished_when_it_was_tested_at_the_last_step_of_the_same_options(tmp_path):
    run = Planned(tmp_path, ("--lr", "0.1"), ())
    assert not is_finished(run)
    log = finished_log()
    log[0] = HEADER | {"command": shlex.join([*train.COMMAND, "--lr", "0.1", "--data", "somewhere"])}
    write_log(tmp_path, *log[:-1])
    assert not is_finished(run)
    write_log(tmp_path, *log)
    assert is_finished(run)
    assert not is_finished(run._replace(options=("--lr", "0.2")))
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text()[:-9])  # killed while it wrote
    assert not is_finished(run)
    path.write_text("")
    assert not is_finished(run)


# The experiments


def test_every_setting_has_a_name_of_its_own():
    for experiment in EXPERIMENTS.values():
        labels = [setting.label for setting in experiment.settings]
        assert len(set(labels)) == len(labels)
    assert set(SOURCE) < {setting.label for setting in EXPERIMENTS["schedulers"].settings}
    assert arguments({"lr": 0.1, "augment": False}) == ["--lr", "0.1", "--no-augment"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_is_one_that_a_training_takes(name):
    for setting in EXPERIMENTS[name].settings:
        given = train._parser().parse_args(["--data", "D", "--out", "O", *arguments(dict(setting.options))])
        assert all(getattr(given, key.replace("-", "_")) is not None for key in setting.options)


def test_all_experiments_at_toy_scale(places, digest, tmp_path, capsys, monkeypatch):
    """Five settings of each, as a training takes half a second."""
    for name, experiment in EXPERIMENTS.items():
        monkeypatch.setitem(EXPERIMENTS, name, experiment._replace(settings=experiment.settings[:5]))
    paper.main([*places, "--seeds", "1", "--jobs", "0"])
    printed = capsys.readouterr().out
    assert "missing" not in printed
    own = suffix_of(digest)
    assert own == f"-images{digest[:8]}"
    for name, experiment in EXPERIMENTS.items():
        rows = lines_of(tmp_path / "results" / f"{name}{own}.toy.jsonl")
        assert [row["setting"] for row in rows] == [setting.label for setting in experiment.settings]
        assert {(row["scale"], row["data"]) for row in rows} == {("toy", digest)}
        text = (tmp_path / "results" / f"{name}{own}.md").read_text()
        assert f"python -m benchmarks.paper {name} --scale toy" in text
        assert f"python -m benchmarks.paper {name} --scale full" in text
        assert str(tmp_path) not in text
        assert f"wrote {tmp_path / 'results' / name}{own}.toy.png" in printed
        assert (tmp_path / "results" / f"{name}{own}.toy.png").stat().st_size > 10_000

    # What several experiments have in common was run once, and nothing is run again.
    runs = list((tmp_path / "runs").glob(f"toy{own}/*/seed-*/log.jsonl"))
    settings = {frozenset(setting.options.items()) for it in EXPERIMENTS.values() for setting in it.settings}
    assert len(runs) == len(settings)
    before = {path: path.stat().st_mtime_ns for path in runs}
    paper.main([*places, "--seeds", "1", "--jobs", "0", "readings"])
    assert {path: path.stat().st_mtime_ns for path in runs} == before

    # The settings are what their options say.
    by_name = {path.parents[1].name: probes_of(path.parent) for path in runs}
    assert len(by_name["scheduler-paper"]) == 12
    assert len(by_name["every-epoch_scheduler-paper"]) == 4
    assert by_name["factors-7_scheduler-paper"][0]["factors"] == list(FACTORS_7)
    assert by_name["scheduler-cosine"] == []


def test_runs_go_on_in_processes_and_those_that_fail_are_named(places, digest, tmp_path, capsys):
    runs, results = tmp_path / "runs" / f"toy{suffix_of(digest)}", tmp_path / "results"
    command = [*places, "factors", "--seeds", "1"]
    paper.main([*command, "--minutes", "0"])
    assert "3 of 3 runs are missing" in capsys.readouterr().out
    assert not results.exists()

    # A directory where a log should be: this run cannot write.
    (runs / "factors-5_scheduler-paper" / "seed-0" / "checkpoint.pt").mkdir(parents=True)
    with pytest.raises(SystemExit) as failed:
        paper.main([*command, "--jobs", "2"])
    assert failed.value.code == 2
    said = capsys.readouterr().err
    assert "1 of 3 runs failed" in said
    (name,) = (line.strip() for line in said.splitlines() if line.endswith("stderr.txt"))
    assert name == str(runs / "factors-5_scheduler-paper" / "seed-0" / "stderr.txt")
    assert "checkpoint.pt" in (runs / "factors-5_scheduler-paper" / "seed-0" / "stderr.txt").read_text()
    rows = lines_of(results / f"factors{suffix_of(digest)}.toy.jsonl")
    assert {row["setting"] for row in rows} == {"Factor_3", "Factor_7"}


def test_running_trainings_are_stopped_when_the_time_is_up(images, cache, tmp_path):
    places = ("--data", str(images), "--cache", str(cache), "--device", "cpu")
    long = Planned(tmp_path / "long", ("--batch-size", "8", "--width", "4", "--epochs", "100000"), places)
    start = time.monotonic()
    assert run_missing([long], jobs=1, minutes=0.1) == []
    assert 5 < time.monotonic() - start < 60
    assert not is_finished(long)


def test_a_report_keeps_what_was_there_and_drops_what_is_no_longer_asked_for(tmp_path):
    constant, linear = EXPERIMENTS["schedulers"].settings[:2]
    for name, accuracy in (("first", 0.5), ("second", 0.75)):
        write_log(tmp_path / name, *finished_log(accuracy))
    report = Report("schedulers", "toy", tmp_path / "results", CIFAR_10)
    assert report.write() == []
    report.add(constant, 0, tmp_path / "first")
    lines, _, text = report.write()
    assert "| constant | 50.0 % | 83.5 % | 50.0 % | 1.750 |" in text.read_text()

    report = Report("schedulers", "toy", tmp_path / "results", CIFAR_10)
    report.add(constant, 1, tmp_path / "second")
    report.add(linear, 0, tmp_path / "second")
    report.write()
    rows = lines_of(lines)
    assert [(row["setting"], row["seed"]) for row in rows] == [("constant", 0), ("constant", 1), ("linear", 0)]
    assert "| constant | 62.5 ± 17.7 % | 83.5 % | 50.0 ± 0.0 % | 1.750 ± 0.000 |" in text.read_text()
    assert "| linear | 75.0 % | 85.2 % | 50.0 % | 1.750 |" in text.read_text()

    rows[0]["options"]["epochs"] = 9  # as if the scale had been another then
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Report("schedulers", "toy", tmp_path / "results", CIFAR_10).write()
    kept = lines_of(lines)
    assert [(row["setting"], row["seed"]) for row in kept] == [("constant", 1), ("linear", 0)]


def test_data_sets_share_no_table(tmp_path):
    others = {
        "4c623e5fafd382e2f0e2c0bf7de20313a80f2201c98919a3194b632a0872e831": ("CIFAR-100", "-cifar100"),
        "0123456789": ("images 01234567", "-images01234567"),
    }
    assert (name_of(CIFAR_10), suffix_of(CIFAR_10)) == ("CIFAR-10", "")
    constant, written = EXPERIMENTS["schedulers"].settings[0], []
    for digest in (CIFAR_10, *others):
        log = finished_log()
        log[0] = HEADER | {"data": digest}
        write_log(tmp_path / digest, *log)
        report = Report("schedulers", "toy", tmp_path / "results", digest)
        report.add(constant, 0, tmp_path / digest)
        lines, image, text = report.write()
        written.append((lines.name, image.name, text.name))
        assert [row["data"] for row in lines_of(lines)] == [digest]
        name = name_of(digest)
        assert text.read_text().startswith(f"# Schedulers, {name}\n")
        assert f"\n{name}: 4 images to train on" in text.read_text()
        assert f"({image.name})" in text.read_text()
        assert ("83.5 %" in text.read_text()) == (digest == CIFAR_10)  # the source's figures are of that
    assert [name_of(digest) for digest in others] == [name for name, _ in others.values()]
    for (_, suffix), files in zip(others.values(), written[1:], strict=True):
        assert files == tuple(f"schedulers{suffix}.{end}" for end in ("toy.jsonl", "toy.png", "md"))
    with pytest.raises(ValueError, match="is of images 0123456789, and this report of"):
        Report("schedulers", "toy", tmp_path / "results", CIFAR_10).add(constant, 0, tmp_path / "0123456789")
    # Rows of other data that lie in a file of that name are not taken over.
    (tmp_path / "results" / written[0][0]).write_text((tmp_path / "results" / written[1][0]).read_text())
    assert Report("schedulers", "toy", tmp_path / "results", CIFAR_10).write() == []


def test_scales_do_not_share_a_table(tmp_path):
    write_log(tmp_path / "run", *finished_log())
    for scale in ("toy", "full"):
        report = Report("schedulers", scale, tmp_path / "results", CIFAR_10)
        report.add(EXPERIMENTS["schedulers"].settings[0], 0, tmp_path / "run")
        *_, text = report.write()
    tables = text.read_text().split("\n## ")[1:]
    assert [table.splitlines()[0] for table in tables] == ["Full scale", "Toy scale"]
    for table, scale in zip(tables, ("full", "toy"), strict=True):
        assert f"| accuracy, {scale} scale |" in table
        assert f"--scale {scale}" in table
        assert "source's accuracy, its own scale" in table


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["schedule"], ["'schedule' is not one of schedulers, factors"]),
        (["--seeds", "0"], ["--seeds", "'0'", "at least 1"]),
        (["--minutes", "nan"], ["--minutes", "'nan'"]),
        (["--data", "missing"], ["--data missing", "no such directory"]),
    ],
)
def test_bad_arguments_are_named_with_a_remedy(places, capsys, more, said):
    with pytest.raises(SystemExit) as refused:
        paper.main([*places, *more])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert [text for text in said if text not in message] == []


@pytest.mark.parametrize(
    ("more", "step"),
    [
        (["--scale", "full", "--device", "cuda"], "captured"),
        (["--scale", "full", "--device", "cuda:1", "--step", "compiled"], "compiled"),
        (["--scale", "full", "--device", "cpu"], "eager"),
        (["--scale", "small", "--device", "cuda"], "eager"),
    ],
)
def test_the_full_scale_is_captured_on_a_gpu(places, monkeypatch, more, step):
    asked = []
    for module in (paper, train):
        monkeypatch.setattr(module, "device", str)  # there may be no such device
    monkeypatch.setattr(paper, "run_missing", lambda wanted, *_: asked.extend(wanted) or [])
    paper.main([*places, *more, "schedulers"])
    assert len(asked) == 18
    for run in asked:
        args = train._parser().parse_args([*run.options, *run.places, "--out", str(run.out)])
        assert args.step == step
        if "full" in more:
            setting = args.epochs, args.batch_size, args.lr, args.width, args.limit, args.momentum
            assert setting == (100, 32, 0.005, 64, None, 0.0)


def test_the_full_scale_asks_for_a_gpu(images, cache, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        paper.main(["--data", str(images), "--cache", str(cache), "--scale", "full"])
    assert "use --scale small" in capsys.readouterr().err
