import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.paper import data, run, train
from benchmarks.paper.data import Batches, load_dataset
from benchmarks.paper.models import ResNet18

Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIZE = 16
# Of 75 images 69 are left to train on: the last batch is not full.
SMALL = ["--width", "4", "--batch-size", "8", "--momentum", "0.9", "--validation", "6"]


def write_shard(path, count, label="label", classes=3, seed=0):
    """Write noise images as lossless WebP; return them, uint8 [count, 3, SIZE, SIZE], and their labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    rows = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "WEBP", lossless=True, exact=True)
        rows.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"img": rows, label: labels.tolist()}), path)
    return pixels, labels


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A directory with two training shards and a test shard."""
    directory = tmp_path_factory.mktemp("images")
    write_shard(directory / "train-00000-of-00002.parquet", 40, seed=1)
    write_shard(directory / "train-00001-of-00002.parquet", 35, seed=2)
    write_shard(directory / "test-00000-of-00001.parquet", 20, seed=3)
    return directory


@pytest.fixture
def arguments(images, tmp_path):
    def build(out, *more):
        places = ["--data", str(images), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / out)]
        return [*places, *SMALL, "--device", "cpu", *more]

    return build


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_cost(rows):
    """Return the rows after the header, less the time and memory that they took."""
    assert rows[0]["kind"] == "header"
    rows = [{key: value for key, value in row.items() if key not in ("seconds", "memory")} for row in rows[1:]]
    for row in rows:
        if "probe" in row:
            assert row["probe"].pop("seconds") > 0
    return rows


def assert_same_run(out, expected):
    """Assert that two finished runs have the same bits: parameters, optimizer, scheduler, log."""
    assert without_cost(rows_of(out)) == without_cost(rows_of(expected))
    states = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (out, expected)]
    for state in states:
        state["scheduler"].pop("evaluator", None)  # how many candidates the free memory allows at once
    for part in ("model", "optimizer", "scheduler", "rng", "step"):
        got, wanted = [], []
        for state, leaves in zip(states, (got, wanted), strict=True):
            flatten(state[part], leaves)
        assert len(got) == len(wanted) > 0
        for a, b in zip(got, wanted, strict=True):
            assert type(a) is type(b)
            assert (
                torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (math.isnan(a) and math.isnan(b))
            ), part


def flatten(value, leaves):
    if isinstance(value, dict):
        for key in value:
            leaves.append(key)
            flatten(value[key], leaves)
    elif isinstance(value, list | tuple):
        for item in value:
            flatten(item, leaves)
    else:
        leaves.append(value)


# The model


def test_resnet18_has_the_number_of_parameters_it_is_known_for():
    assert sum(parameter.numel() for parameter in ResNet18(10).parameters()) == 11_173_962


def test_resnet18_computes_what_its_weights_say():
    model = ResNet18(classes=5, width=4)
    weights = dict(model.named_parameters())
    x = torch.randn(3, 3, 32, 32)

    def conv_and_norm(x, conv, norm, stride):
        weight = weights[conv + ".weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        scale, shift = (weights[f"{norm}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    out = conv_and_norm(x, "stem", "norm", 1).clamp_min(0)
    for index, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        block = f"blocks.{index}."
        inner = conv_and_norm(out, block + "conv1", block + "norm1", stride).clamp_min(0)
        inner = conv_and_norm(inner, block + "conv2", block + "norm2", 1)
        if stride == 2:
            out = conv_and_norm(out, block + "shortcut.0", block + "shortcut.1", 2)
        out = (inner + out).clamp_min(0)
    assert out.shape == (3, 32, 4, 4)
    expected = F.adaptive_avg_pool2d(out, 1).flatten(1) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


# The data


def test_images_and_labels_are_what_was_written(tmp_path):
    first, first_labels = write_shard(tmp_path / "train-0.parquet", 5, seed=1)
    second, second_labels = write_shard(tmp_path / "train-1.parquet", 4, seed=2)
    test, test_labels = write_shard(tmp_path / "test-0.parquet", 3, seed=3)
    dataset = load_dataset(tmp_path, tmp_path / "cache")
    assert torch.equal(dataset.train_images, torch.cat([first, second]))
    assert torch.equal(dataset.train_labels, torch.cat([first_labels, second_labels]))
    assert torch.equal(dataset.test_images, test)
    assert torch.equal(dataset.test_labels, test_labels)


def test_decoding_is_cached_until_the_files_change(tmp_path, monkeypatch):
    write_shard(tmp_path / "train-0.parquet", 5, seed=1)
    write_shard(tmp_path / "test-0.parquet", 3, seed=2)
    cold = load_dataset(tmp_path, tmp_path / "cache")
    decoded = []
    decode = data._decode
    monkeypatch.setattr(data, "_decode", lambda paths: decoded.append(paths) or decode(paths))
    warm = load_dataset(tmp_path, tmp_path / "cache")
    assert decoded == []
    assert all(torch.equal(a, b) for a, b in zip(cold[:4], warm[:4], strict=True))
    assert warm.digest == cold.digest
    os.utime(tmp_path / "test-0.parquet", ns=(1, 1))
    assert load_dataset(tmp_path, tmp_path / "cache").digest == cold.digest
    assert len(decoded) == 2
    write_shard(tmp_path / "test-0.parquet", 3, seed=4)
    assert load_dataset(tmp_path, tmp_path / "cache").digest != cold.digest


def test_batches_hold_each_image_once_an_epoch_in_a_new_order():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, SIZE, SIZE)
    batches = Batches(images, torch.arange(12), batch_size=4, seed=0, augment=False)
    epochs = [[batches.batch(step)[1].tolist() for step in range(start, start + 3)] for start in (0, 3)]
    assert all(sorted(itertools.chain(*epoch)) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batches.batch(1)[1].tolist() == epochs[0][1]  # back again: nothing but the step counts
    assert Batches(images, torch.arange(12), 4, seed=1, augment=False).batch(0)[1].tolist() != epochs[0][0]


def test_batches_are_normalized_by_the_training_set():
    images = torch.randint(256, (40, 3, SIZE, SIZE), dtype=torch.uint8)
    images[:, 1] //= 3
    x, _ = Batches(images, torch.zeros(40, dtype=torch.int64), 40, seed=0, augment=False).batch(0)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_augmentation_is_one_of_the_81_crops_flipped_or_not():
    images = torch.randint(1, 256, (24, 3, SIZE, SIZE), dtype=torch.uint8)
    plain, augmented = (Batches(images, torch.arange(24), 24, seed=0, augment=on) for on in (False, True))
    found = []
    for step in range(2):
        source = images[plain.batch(step)[1]]
        x, labels = augmented.batch(step)
        assert torch.equal(labels, plain.batch(step)[1])
        for before, after in zip(source, x, strict=True):
            padded = torch.zeros(3, SIZE + 8, SIZE + 8, dtype=torch.uint8)
            padded[:, 4:-4, 4:-4] = before
            crops = {
                (top, left, flip): padded[:, top : top + SIZE, left : left + SIZE].flip(2 if flip else ())
                for top, left, flip in itertools.product(range(9), range(9), (False, True))
            }
            found.append([how for how, crop in crops.items() if torch.equal(plain.normalize(crop[None])[0], after)])
    assert all(len(how) == 1 for how in found)
    tops, lefts, flips = zip(*[how[0] for how in found], strict=True)
    assert len(set(tops)) > 5
    assert len(set(lefts)) > 5
    assert 8 < sum(flips) < 40
    assert found[:24] != found[24:]


# A run


def test_the_log_says_what_was_done(arguments, tmp_path):
    train.main(arguments("run", "--scheduler", "auto", "--epochs", "4", "--every", "5", "--eval-every", "10"))
    header, *rows = rows_of(tmp_path / "run")
    steps = [row for row in rows if row["kind"] == "step"]
    validations, tests = ([row for row in rows if row["kind"] == kind] for kind in ("validation", "test"))
    assert (header["classes"], header["train_images"], header["test_images"]) == (3, 69, 20)
    assert (header["steps_per_epoch"], header["total_steps"], header["args"]["momentum"]) == (8, 32, 0.9)
    assert header["parameters"] == sum(p.numel() for p in ResNet18(3, width=4).parameters())
    assert [row["step"] for row in steps] == list(range(1, 33))
    assert [row["epoch"] for row in steps] == [step // 8 for step in range(32)]
    assert [row["step"] for row in validations] == [10, 20, 30, 32]
    assert [row["step"] for row in tests] == [32]
    assert header["validation_images"] == 6
    seconds, memory = zip(*((row["seconds"], row["memory"]) for row in (*validations, *tests)), strict=True)
    for kind in ("training", "probing", "evaluating"):
        spent = [each[kind] for each in seconds]
        assert spent == sorted(spent)
        assert spent[0] > 0
    assert memory == tuple(sorted(memory))
    assert 2**26 < memory[0] < 2**36  # a process that has loaded torch

    # Probes: of the first 20 steps, which is past the half; each starts where the last left, annealing included.
    probes = [row["probe"] for row in steps if "probe" in row]
    made = [probe["step"] for probe in probes]
    assert made[:3] == [1, 2, 4]
    assert made == sorted(set(made) & set(range(1, 21)))
    assert {probe["evaluator"] for probe in probes} == {"streamed"}
    assert probes[0]["rounds"] > 1
    for row, following in itertools.pairwise(steps):
        if "probe" in row:
            assert row["probe"]["lr_before"] == row["lr"]
            assert row["probe"]["lr_after"] == following["lr"]
    for probe in probes[1:]:
        factor = math.prod(f**w for f, w in zip(probe["factors"], probe["weights"], strict=True))
        assert probe["factor"] == pytest.approx(factor)

    cosine = [1 + math.cos(math.pi * step / 32) for step in (30, 31)]
    assert steps[31]["lr"] / steps[30]["lr"] == pytest.approx(cosine[1] / cosine[0])

    # The first loss and the last accuracy, by hand.
    dataset = load_dataset(Path(header["args"]["data"]), tmp_path / "cache")
    batches = Batches(dataset.train_images[:69], dataset.train_labels[:69], 8, seed=0, augment=True)
    torch.manual_seed(0)
    x, y = batches.batch(0)
    model = ResNet18(3, width=4)
    assert steps[0]["loss"] == pytest.approx(F.cross_entropy(model(x), y).item())
    model.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"])
    model.eval()
    sets = {"test": (dataset.test_images, dataset.test_labels)}
    sets["validation"] = (dataset.train_images[69:], dataset.train_labels[69:])
    for row in (validations[-1], tests[-1]):
        images, labels = sets[row["kind"]]
        logits = torch.cat([model(batches.normalize(image[None])) for image in images])
        correct = [int(logit.argmax()) == int(label) for logit, label in zip(logits, labels, strict=True)]
        assert row["accuracy"] == sum(correct) / len(labels)
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "rate"),
    [
        ("constant", lambda step: 1.0),
        ("linear", lambda step: 1 - step / 16),
        ("cosine", lambda step: (1 + math.cos(math.pi * step / 16)) / 2),
        ("step", lambda step: 0.1 ** (step // 6)),
    ],
)
def test_schedules_span_the_epochs_and_steps_only_stops(arguments, tmp_path, scheduler, rate):
    train.main(arguments("run", "--scheduler", scheduler, "--epochs", "2", "--lr", "0.02", "--steps", "14"))
    steps = [row for row in rows_of(tmp_path / "run") if row["kind"] == "step"]
    assert [row["lr"] for row in steps] == pytest.approx([0.02 * rate(step) for step in range(14)])


def test_paper_probes_every_step_with_the_factors_asked_for(arguments, tmp_path):
    train.main(arguments("run", "--scheduler", "paper", "--factors", "5", "--epochs", "1", "--steps", "3"))
    probes = [row["probe"] for row in rows_of(tmp_path / "run") if row["kind"] == "step"]
    assert [probe["factors"] for probe in probes] == [[4, 2, 1, 0.5, 0.125]] * 3
    assert [probe["rounds"] for probe in probes] == [1] * 3


def test_classes_come_from_the_data_whatever_the_label_is_called(tmp_path):
    write_shard(tmp_path / "train-0.parquet", 21, label="fine_label", classes=7)
    write_shard(tmp_path / "test-0.parquet", 4, label="fine_label", classes=2)
    places = ["--data", str(tmp_path), "--cache", str(tmp_path), "--out", str(tmp_path / "run")]
    # The first six images have six of the classes: the limit does not change the model.
    train.main(
        [*places, "--width", "4", "--batch-size", "6", "--limit", "6", "--scheduler", "step", "--epochs", "1"]
    )
    assert rows_of(tmp_path / "run")[0]["classes"] == 7
    model = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert model["head.weight"].shape == (7, 32)


# Resuming


def test_a_killed_run_goes_on_bit_for_bit(arguments, images, tmp_path):
    more = ["--scheduler", "auto", "--epochs", "8", "--every", "5", "--eval-every", "9", "--checkpoint-every", "7"]
    command = [sys.executable, "-m", "benchmarks.paper.train", *arguments("killed", *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    options = {"cwd": Path(train.__file__).parents[2], "env": environment, "stderr": subprocess.DEVNULL}
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    with subprocess.Popen(command, **options) as process:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(checkpoint, weights_only=True)["step"] < 64

    subprocess.run(command, check=True, **options)
    train.main(arguments("uninterrupted", *more))
    assert_same_run(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.mark.parametrize("scheduler", ["auto", "paper", "cosine", "linear", "step"])
def test_an_interrupted_run_goes_on_bit_for_bit(arguments, tmp_path, monkeypatch, scheduler):
    more = ["--scheduler", scheduler, "--epochs", "3", "--eval-every", "5", "--checkpoint-every", "7"]
    train.main(arguments("uninterrupted", *more))
    train_step = run.Run._train_step

    def interrupted(run):
        if run.step == 11:
            raise KeyboardInterrupt
        train_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "_train_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments("interrupted", *more))
    assert stopped.value.code == 130
    # The log is ahead of the checkpoint: what it has beyond has to go.
    assert rows_of(tmp_path / "interrupted")[-1]["step"] == 10
    assert torch.load(tmp_path / "interrupted" / "checkpoint.pt", weights_only=True)["step"] == 7

    resumed_at = []
    monkeypatch.setattr(run.Run, "_train_step", lambda run: resumed_at.append(run.step) or train_step(run))
    train.main(arguments("interrupted", *more))
    assert resumed_at == list(range(7, 24))
    assert_same_run(tmp_path / "interrupted", tmp_path / "uninterrupted")


def test_a_finished_run_is_left_alone_and_more_steps_go_on(arguments, tmp_path, capsys):
    more = ["--scheduler", "cosine", "--epochs", "2"]
    train.main(arguments("run", *more, "--steps", "6"))
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    train.main(arguments("run", *more, "--steps", "6"))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    assert "its 6 steps are done; raise --steps to go on" in capsys.readouterr().err

    train.main(arguments("run", *more))
    train.main(arguments("whole", *more))
    run, whole = (without_cost(rows_of(tmp_path / out)) for out in ("run", "whole"))
    stops = run[6:8]
    del run[6:8]
    assert [(stop["kind"], stop["step"]) for stop in stops] == [("validation", 6), ("test", 6)]
    assert run == whole


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--lr", "0.01"], ["--lr is 0.01", "with 0.005", "another --out"]),
        (["--eval-every", "3"], ["--eval-every is 3", "with None"]),
        (["--no-augment"], ["--augment is False", "with True"]),
    ],
)
def test_other_arguments_do_not_go_on_with_a_run(arguments, tmp_path, capsys, other, said):
    more = ["--scheduler", "cosine", "--epochs", "1"]
    train.main(arguments("run", *more, "--steps", "2"))
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert_refused(arguments("run", *more, *other), said, capsys)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files


def test_other_images_do_not_go_on_with_a_run(arguments, images, tmp_path, capsys):
    more = ["--scheduler", "cosine", "--epochs", "1", "--steps", "2"]
    train.main(arguments("run", *more))
    (tmp_path / "moved").mkdir()
    for path in images.iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    moved = ["--data", str(tmp_path / "moved")]
    train.main(arguments("run", *more, *moved))
    write_shard(tmp_path / "moved" / "test-00000-of-00001.parquet", 20, seed=9)
    assert_refused(arguments("run", *more, *moved), ["--data", "images"], capsys)


def test_a_log_that_lost_rows_is_not_gone_on_with(arguments, tmp_path, capsys):
    more = ["--scheduler", "cosine", "--epochs", "1"]
    train.main(arguments("run", *more, "--steps", "2"))
    (tmp_path / "run" / "log.jsonl").write_text("")
    assert_refused(arguments("run", *more), ["log.jsonl is 0 bytes long"], capsys)


def test_a_loss_that_is_not_finite_is_null(arguments, tmp_path):
    train.main(arguments("run", "--scheduler", "constant", "--lr", "1e30", "--epochs", "1", "--steps", "4"))
    assert [row["loss"] for row in rows_of(tmp_path / "run") if row["kind"] == "step"][-1] is None


# What is refused


def assert_refused(argv, said, capsys):
    with pytest.raises(SystemExit) as refused:
        train.main(argv)
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert [text for text in said if text not in message] == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr", "0"], ["--lr", "'0'", "above 0"]),
        (["--lr", "nan"], ["--lr", "'nan'", "above 0"]),
        (["--lr", "1e6"], ["lr=1000000.0", "lr_limits"]),
        (["--momentum", "1"], ["--momentum", "'1'", "below 1"]),
        (["--weight-decay", "-1"], ["--weight-decay", "'-1'", "at least 0"]),
        (["--epochs", "1.5"], ["--epochs", "'1.5'", "a whole number of at least 1"]),
        (["--every", "0"], ["--every", "'0'", "at least 1"]),
        (["--scheduler", "cosin"], ["--scheduler", "'cosin'", "'cosine'"]),
        (["--every", "epochs"], ["--every", "'epochs'", "'epoch'"]),
        (["--scheduler", "cosine", "--every", "2"], ["--every 2", "--scheduler cosine", "leave it out"]),
        (["--scheduler", "step", "--score", "rank"], ["--score rank", "--scheduler step", "leave it out"]),
        (["--scheduler", "step", "--score-batch", "independent"], ["--score-batch independent", "leave it out"]),
        (["--factors", "4"], ["--factors", "4", "'3', '5', '7', 'wide'"]),
        (["--device", "nowhere"], ["--device", "'nowhere'", "use 'cpu'"]),
        (["--limit", "70"], ["--limit 70", "69 images"]),
        (["--validation", "75"], ["--validation 75", "75 images", "less"]),
        (["--test-limit", "21"], ["--test-limit 21", "20 images"]),
        (["--batch-size", "70"], ["--batch-size 70", "69 images"]),
        (["--data", "missing"], ["--data missing", "no such directory"]),
    ],
)
def test_bad_arguments_are_named_with_a_remedy(arguments, capsys, more, said):
    assert_refused(arguments("run", *more), said, capsys)


def test_bad_data_are_named_with_a_remedy(arguments, tmp_path, capsys):
    directory = tmp_path / "bad"
    directory.mkdir()
    argv = arguments("run", "--data", str(directory))
    assert_refused(argv, [str(directory), "no train-*.parquet"], capsys)
    train_file, test_file = directory / "train-0.parquet", directory / "test-0.parquet"
    write_shard(train_file, 9)
    assert_refused(argv, [str(directory), "no test-*.parquet"], capsys)
    test_file.write_bytes(b"no parquet")
    assert_refused(argv, [str(test_file), "cannot be read as parquet"], capsys)
    write_shard(test_file, 9, label="colour")
    assert_refused(argv, [str(test_file), "'colour'", "fine_label"], capsys)
    write_shard(test_file, 9, classes=5)
    assert_refused(argv, [str(directory), "test label 4", "largest training label, 2"], capsys)
    pq.write_table(pa.table({"img": [{"bytes": b"no image"}], "label": [0]}), test_file)
    assert_refused(argv, [str(test_file), "row 0", "not an image"], capsys)
