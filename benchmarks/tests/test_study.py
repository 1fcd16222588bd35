import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from autolr_fast._evaluators import Prober
from benchmarks.models import CharacterTransformer
from benchmarks.paper.data import DataError, Dataset
from benchmarks.study import __main__ as study
from benchmarks.study import slices, tasks
from benchmarks.study.grid import DETERMINISTIC, DROPOUT, REFERENCE, STARTED, STARTS, STUDIES, TUNED
from benchmarks.study.masked import MaskedAutoencoder
from benchmarks.study.methods import AFTER_STEP, METHODS, MUON_AND_ADAMW, OPTIMIZERS
from benchmarks.study.outcomes import error, gain, outcomes
from benchmarks.study.report import (
    held_out_table,
    page,
    paired_table,
    replay_table,
    settings_table,
    table,
    training_table,
    unguarded_table,
    variants_table,
)
from benchmarks.study.signals import SCALES, watch
from benchmarks.study.tasks import TASKS, Data, Places, batch, evaluate, load
from benchmarks.study.training import Cell, train
from benchmarks.study.windows import Quadratic, best_scale, best_scale_without_noise, levels, sharpness

pytest.importorskip("sklearn")

NOWHERE = Places(Path("missing"), Path("missing"), Path("missing"))  # digits and friedman are made, not read


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Make the digits last for 12 steps."""
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(steps=12))


# Tasks


def test_each_epoch_has_every_example_once():
    data = load("digits", NOWHERE)
    y = data.train[1]
    seen = torch.cat([batch(data, step, 7, seed=3)[1] for step in range(len(y) // 7)])
    assert len(seen) == 7 * (len(y) // 7)
    places = [batch(data, step, 7, seed=3)[0] for step in (0, 1, len(y) // 7)]
    assert not torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])
    assert torch.equal(batch(data, 1, 7, seed=3)[0], places[1])


def test_a_share_of_the_labels_is_wrong():
    clean, noisy = load("digits", NOWHERE), load("noise", NOWHERE)
    assert torch.equal(clean.train[0], noisy.train[0])
    assert torch.equal(clean.test[1], noisy.test[1])
    # A fifth is drawn anew, of which a tenth are right by chance.
    assert (clean.train[1] != noisy.train[1]).double().mean() == pytest.approx(0.18, abs=0.04)


@pytest.mark.parametrize("name", ["digits", "friedman"])
def test_the_measure_is_of_the_examples_kept_back(name):
    task, data = TASKS[name], load(name, NOWHERE)
    torch.manual_seed(0)
    model = task.model()
    result = evaluate(task, model, data)
    x, y = data.test
    model.eval()
    if task.measure == "accuracy":
        assert result == pytest.approx(100 * (model(x).argmax(1) == y).double().mean().item())
    else:
        assert result == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-5)


def test_a_text_is_cut_into_pieces(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(6500))
    (tmp_path / "text").write_text(text)
    data = TASKS["lstm"].data(NOWHERE._replace(text=tmp_path / "text"))
    for name, bad in (("short", b"too short"), ("binary", b"\xff" * 9000)):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match="--text .*(has 9 characters|is no text)"):
            TASKS["lstm"].data(NOWHERE._replace(text=tmp_path / name))
    (x, y), (test, _) = data
    assert x.shape == y.shape == (90, 64)
    assert test.shape == (11, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])
    letters = sorted(set(text))
    assert "".join(letters[i] for i in x[3]) == text[192:256]
    model = TASKS["lstm"].model()
    assert TASKS["lstm"].loss(model, x[:4], y[:4]).item() == pytest.approx(math.log(65), rel=0.05)


# Noise in the loss


@pytest.fixture
def images(monkeypatch):
    """Make 64 images to train on and 2,100 to test with, without a file, and trainings of 12 steps."""
    torch.manual_seed(0)
    drawn = [torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8) for count in (64, 2100)]
    drawn = [F.interpolate(part, scale_factor=4) for part in drawn]  # flat enough to fill in
    labels = [torch.randint(10, (len(part),)) for part in drawn]
    dataset = Dataset(drawn[0], labels[0], drawn[1], labels[1], "")
    monkeypatch.setattr(tasks, "load_dataset", lambda *_, **__: dataset)
    for name in ("diffusion", "masked"):
        monkeypatch.setitem(TASKS, name, TASKS[name]._replace(steps=12))
    load.cache_clear()
    yield
    load.cache_clear()


NOISY = ["diffusion", "masked"]


@pytest.mark.parametrize("name", NOISY)
def test_the_loss_draws_anew_and_the_measure_does_not(name, images):
    task, data = TASKS[name], load(name, NOWHERE)
    assert len(data.test[0]) == 2000
    torch.manual_seed(0)
    model = task.model()
    assert 100_000 < sum(parameter.numel() for parameter in model.parameters()) < 300_000
    one, other = (task.loss(model, *batch(data, 0, 16, seed=0)).item() for _ in range(2))
    assert one != other
    assert one == pytest.approx(1.0, abs=0.5)
    before = torch.get_rng_state()
    measured = evaluate(task, model, data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert evaluate(task, model, data) == measured


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("method", ["cosine", "AutoLR", AFTER_STEP])
def test_a_noisy_loss_is_learnt(name, method, images):
    row = train(Cell(name, "AdamW", method, 0.003, seed=0, batch_size=16), NOWHERE)
    assert row["losses"][-1] < row["losses"][0]
    assert row["result"] is not None


def test_an_image_at_time_zero_is_itself_and_at_one_is_noise(monkeypatch):
    seen = {}

    def predict(noised, times):
        seen["noised"] = noised
        return torch.zeros_like(noised)

    images = torch.randn(4, 3, 16, 16)
    monkeypatch.setattr(torch, "rand", lambda count: torch.tensor([0.0, 1.0, 0.5, 1 / 3]))
    torch.manual_seed(0)
    loss = TASKS["diffusion"].loss(predict, images, torch.zeros(4))
    torch.manual_seed(0)
    noise = torch.randn_like(images)
    assert loss.item() == pytest.approx(noise.square().mean().item())
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5], [0.75**0.5, 0.5]])
    expected = shares[:, 0, None, None, None] * images + shares[:, 1, None, None, None] * noise
    assert torch.allclose(seen["noised"], expected, atol=1e-6)


def test_what_is_hidden_is_not_seen():
    """Other values in the hidden patches change nothing of what these are taken for."""
    model = MaskedAutoencoder()
    images = torch.randn(3, 3, 16, 16)
    torch.manual_seed(0)
    filled, hidden = model(images)
    assert filled.shape == hidden.shape == (3, 48, 12)
    torch.manual_seed(0)
    order = torch.rand(3, 64).argsort(dim=1)
    changed = F.unfold(images, 2, stride=2)
    for image, places in enumerate(order[:, 16:]):
        assert torch.equal(changed[image].T[places], hidden[image])
        changed[image, :, places] += 1
    torch.manual_seed(0)
    again, moved = model(F.fold(changed, (16, 16), 2, stride=2))
    assert torch.equal(again, filled)
    assert torch.allclose(moved, hidden + 1)
    assert not torch.equal(model(images)[0], filled)


def test_dropout_draws_in_training_only():
    text = torch.randint(65, (2, 8))
    models = []
    for options in ({}, {"dropout": 0.3}):
        torch.manual_seed(0)
        models.append(CharacterTransformer(65, width=16, layers=2, heads=2, context=8, **options))
    plain, dropping = models
    assert torch.equal(plain(text), plain(text))
    assert not torch.equal(dropping(text), dropping(text))
    assert torch.equal(dropping.eval()(text), plain(text))
    assert TASKS[DROPOUT].model().dropout.p == 0.3


# Two optimizers


def text_task(monkeypatch):
    """Make the transformer read a text that is not in a file, for 12 steps."""
    torch.manual_seed(0)
    x = torch.randint(5, (40, 65)).cumsum(1) % 65
    data = Data((x[:, :-1], x[:, 1:]), (x[:8, :-1], x[:8, 1:]))
    monkeypatch.setitem(TASKS, "transformer", TASKS["transformer"]._replace(steps=12, data=lambda _: data))


@pytest.mark.parametrize("method", ["cosine", "AutoLR"])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(method, monkeypatch):
    text_task(monkeypatch)
    model = TASKS["transformer"].model()
    muon, adamw = METHODS[method](model, MUON_AND_ADAMW, 0.01, 12).optimizers
    taken = {id(parameter) for parameter in muon.param_groups[0]["params"]}
    rest = {id(parameter) for parameter in adamw.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("blocks") and parameter.ndim == 2
        assert (id(parameter) in taken, id(parameter) in rest) == (is_matrix, not is_matrix)
    load.cache_clear()
    row = train(Cell("transformer", MUON_AND_ADAMW, method, 0.01, seed=0), NOWHERE)
    load.cache_clear()
    assert row["losses"][-1] < row["losses"][0]
    assert row["lrs"][0] == 0.01


def test_two_optimizers_are_annealed_alike():
    training = METHODS["cosine"](TASKS["transformer"].model(), MUON_AND_ADAMW, 0.1, 4)
    for _ in range(4):
        rates = [optimizer.param_groups[0]["lr"] for optimizer in training.optimizers]
        assert rates == [training.lr] * 2
        for optimizer, scheduler in zip(training.optimizers, training.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert training.lr == pytest.approx(0.0)


# Trainings


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    packages = {"D-Adaptation": "dadaptation", "Prodigy": "prodigyopt", "Schedule-Free": "schedulefree"}
    pytest.importorskip({**packages, "DoG": "dog", "SaLSA": "salsa"}.get(method, "torch"))
    row = train(Cell("digits", "AdamW", method, 0.01, seed=1), NOWHERE)
    assert row["steps"] == 12
    assert row["lost"] is None
    assert row["losses"][-1] < row["losses"][0]
    assert row["lrs"][0] == (0.0004 if method in ("one cycle", "AutoLR, warmed up") else 0.01)
    assert 0 <= row["scheduling"] < row["seconds"]


@pytest.mark.parametrize(("optimizer", "ends"), [("SGD", (0.0, 0.0)), ("momentum", (0.85, 0.95))])
def test_one_cycle_gives_plain_sgd_no_momentum(optimizer, ends):
    training = METHODS["one cycle"](TASKS["digits"].model(), optimizer, 0.1, 9)
    (optim,), (scheduler,) = training.optimizers, training.schedulers
    group = optim.param_groups[0]
    seen = [group["momentum"]]
    for _ in range(9):
        optim.step()
        scheduler.step()
        seen.append(group["momentum"])
    assert (min(seen), max(seen)) == pytest.approx(ends)


def test_a_row_is_what_a_loop_by_hand_gives():
    task, data = TASKS["digits"], load("digits", NOWHERE)
    torch.manual_seed(5)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(24):
        x, y = batch(data, step, 16, seed=5)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 24))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    row = train(Cell("digits", "momentum", "cosine", 0.1, seed=5, batch_size=16, length=2), NOWHERE)
    assert row["losses"] == pytest.approx(losses, rel=1e-3)
    assert row["loss"] == pytest.approx(sum(losses[-2:]) / 2, rel=1e-3)
    assert row["result"] == pytest.approx(evaluate(task, model, data))


def test_a_lost_training_stops_and_has_no_result(monkeypatch):
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(steps=100))
    row = train(Cell("digits", "SGD", "constant", 1e30, seed=0), NOWHERE)
    assert row["result"] is None
    assert row["steps"] < 100
    assert row["lost"] is not None


def test_signals_are_the_losses_along_the_lines(monkeypatch):
    monkeypatch.setitem(TASKS, "friedman", TASKS["friedman"]._replace(steps=20))
    cell = Cell("friedman", "SGD", "cosine", 0.1, seed=0)
    row = watch(cell, NOWHERE)
    task, data = TASKS["friedman"], load("friedman", NOWHERE)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 20))
        optimizer.zero_grad()
        task.loss(model, *batch(data, step, 32, 0)).backward()
        optimizer.step()
    now = [parameter.detach().clone() for parameter in model.parameters()]
    for name, examples in (("own 1", batch(data, 19, 32, 0)), ("next 1", batch(data, 20, 32, 0))):
        for scale, seen in zip(SCALES, row["signals"][name][-1], strict=True):
            for parameter, start, end in zip(model.parameters(), before, now, strict=True):
                parameter.data = start + scale * (end - start)
            assert seen == pytest.approx(task.loss(model, *examples).item(), rel=1e-5)
    assert row["signals"]["own 1"][0] is None  # no probe fell into that quarter
    assert row["result"] == pytest.approx(train(cell, NOWHERE)["result"])


# Where lines settle


@pytest.mark.parametrize(("rate", "window"), [(0.1, 1), (0.5, 1), (1.0, 1), (1.0, 2), (1.0, 3)])
def test_sgd_on_a_noisy_quadratic_settles_at_the_inverse_of_the_curvature(rate, window):
    """One step is ``rate`` of the way to what its batch wants; at 1 it gets there, whatever the steps before."""
    assert best_scale(rate, window, count=20_000) == pytest.approx(1 / rate, rel=0.03)


@pytest.mark.parametrize("rate", [1.5, 1.9])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_lines_over_even_windows_do_not_see_a_crossing(window, rate):
    """By real steps and a search for the best scale: at 1.5 a crossing does not count yet, near 2 it does."""
    model = Quadratic(normalized=False).double()
    torch.nn.init.ones_(model.x)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    history = []
    for _ in range(10):
        history.append(model.x.detach().clone())
        optimizer.zero_grad()
        model(torch.zeros(50)).backward()
        optimizer.step()
    start, end = history[-window], model.x.detach().clone()

    def loss(scale):
        model.x.data = start + scale * (end - start)
        return model(torch.zeros(50)).item()

    best = min((0.01 * i for i in range(1100)), key=loss)
    assert best_scale_without_noise(rate, window) == pytest.approx(best, abs=0.006)
    assert (best > 1) == (window % 2 == 0 or rate < 1.7)
    assert best_scale_without_noise(2.1, window) < 1


@pytest.mark.parametrize("momentum", [0.5, 0.8, 0.9])
def test_two_steps_with_momentum_settle_where_they_are_as_long_as_those_without(momentum):
    assert best_scale(1 - momentum, 2, momentum, count=20_000) == pytest.approx(1.0, rel=0.03)
    assert best_scale(1 - momentum, 1, momentum, count=20_000) > 1.5


def test_a_level_follows_the_length_of_what_is_normalized():
    assert 0.5 < levels(False, 1, steps=300)[-1] < 2
    assert levels(True, 1, steps=300)[-1] > 100
    assert levels(True, 1, steps=300, guard=10)[-1] < 100


def test_sharpness_is_the_largest_curvature():
    model = Quadratic(normalized=False)
    model.curvatures.copy_(torch.cat([torch.linspace(0.1, 4.0, 49), torch.tensor([7.0])]))
    assert sharpness(model, model(torch.zeros(50))) == pytest.approx(7.0, rel=0.01)


# The grid, and what is missing of it


def test_studies_ask_for_methods_and_tasks_that_exist():
    of_tasks = {"starts": STARTED, "optimizers": ("transformer",), "replay": (DROPOUT,)}
    for name, each in STUDIES.items():
        cells = list(each.cells(range(2)))
        assert len(set(cells)) == len(cells)
        assert {cell.method for cell in cells} <= set(METHODS)
        assert {cell.task for cell in cells} == set(of_tasks.get(name, DETERMINISTIC))
        optimizers = {MUON_AND_ADAMW} if name == "optimizers" else set(OPTIMIZERS)
        assert {cell.optimizer for cell in cells} <= optimizers
        assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_what_is_changed_has_a_reference_in_its_own_study():
    """The variants have the closure after the step, and so has what they are compared with."""
    for name in ("variants", "guard"):
        cells = list(STUDIES[name].cells(range(1)))
        changed = {cell._replace(method="") for cell in cells if cell.method != REFERENCE}
        assert changed <= {cell._replace(method="") for cell in cells if cell.method == REFERENCE}
    for name in ("batches", "lengths"):
        assert {cell.method for cell in STUDIES[name].cells(range(1))} == {REFERENCE, "cosine"}


def test_only_what_is_missing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slices, "_run", lambda work, cells, *_: (train(cell, NOWHERE) for cell in cells[:3]))
    places = ["--images", "missing", "--text", "missing", "--results", str(tmp_path), "--seeds", "1"]
    command = ["starts", *places, "--tasks", "digits", "--methods", "AutoLR"]
    study.main(command)
    assert "12 of 15 runs are missing" in capsys.readouterr().out
    study.main(command)
    assert "9 of 15 runs are missing" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [*STARTS, STARTS[0]]
    assert [row["optimizer"] for row in rows] == ["SGD"] * 5 + ["momentum"]


def test_work_goes_on_in_processes_until_the_time_is_up(tmp_path, capsys):
    places = ["--images", "missing", "--text", "missing", "--results", str(tmp_path), "--seeds", "1", "--jobs", "1"]
    study.main(["peers", *places, "--tasks", "friedman", "--methods", "Schedule-Free", "--minutes", "0"])
    assert "18 of 18 runs are missing" in capsys.readouterr().out


def test_data_that_are_not_there_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slices, "_run", lambda work, cells, places, *_: (train(cell, places) for cell in cells))
    for task, said in (
        ("images", "--images missing: there is no such directory"),
        ("lstm", "--text missing cannot be read: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as refused:
            study.main(["--images", "missing", "--text", "missing", "--results", str(tmp_path), "--tasks", task])
        assert refused.value.code == 2
        assert said in capsys.readouterr().err


def test_data_are_asked_for_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slices, "_run", lambda *_: pytest.fail("trained"))
    images = "--images is needed for images, diffusion, masked"
    both = f"{images}; --text is needed for transformer, lstm: give"
    for names, said in ((["digits", "lstm"], "--text is needed for lstm: give"), (list(TASKS), both)):
        with pytest.raises(SystemExit):
            study.main(["starts", "--results", str(tmp_path), "--tasks", *names])
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tasks_that_are_made_need_no_data(tmp_path, capsys):
    study.main(["starts", "--results", str(tmp_path), "--tasks", "digits", "--seeds", "1", "--minutes", "0"])
    assert "42 of 42 runs are missing" in capsys.readouterr().out


def test_windows_that_are_combined_are_all_looked_along(monkeypatch):
    spans = []
    look = Prober.look

    def watched(self, line, *args, **kwargs):
        spans.append(line.window)
        return look(self, line, *args, **kwargs)

    monkeypatch.setattr(Prober, "look", watched)
    train(Cell("digits", "SGD", "AutoLR, windows agreeing", 0.1, 0), NOWHERE)
    assert spans[-4:] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["start"], "'start' is not one of starts"),
        (["--seeds", "0"], "'0' cannot be used"),
        (["--methods", "cosin"], "invalid choice: 'cosin'"),
    ],
)
def test_bad_arguments_are_named(more, said, capsys):
    with pytest.raises(SystemExit):
        study.main([*more, "--images", "a", "--text", "b"])
    assert said in capsys.readouterr().err


# The tables


def row(method, lr, seed, result, *, scheduling=1.0, loss=None, **setting):
    cell = Cell("digits", "SGD", method, lr, seed, **setting)
    return {**cell._asdict(), "result": result, "loss": loss, "scheduling": scheduling, "seconds": 11.0}


def test_a_table_compares_with_the_best_tuned_cosine_of_the_same_seed():
    rows = [row("cosine", lr, seed, 90 - abs(math.log10(lr) + 1) + seed) for lr in TUNED for seed in (0, 1, 2)]
    rows += [row("cosine", 1e-6, 0, 99.0)]  # not in the grid that is tuned over
    rows += [row("AutoLR", lr, seed, 92.0 + 2 * seed) for lr in (1e-4, 1.0) for seed in (0, 1, 2)]
    rows += [row("AutoLR", 10.0, seed, None) for seed in (0, 1, 2)]
    rows += [row("AutoLR", 1.0, 7, 100.0)]  # to be compared with nothing
    _, _, cosine, auto = table(outcomes(rows), "SGD", ["cosine", "AutoLR"])
    assert auto == "| AutoLR | +3.0 ± 0.6 (-91.0 .. +3.0), 4.0 | 10% | 3 |"  # 2, 3 and 4: 1 / sqrt(3)
    assert cosine == "| cosine | -1.0 ± 0.0 (-2.5 .. +0.0), 2.0 | 10% | 3 |"
    rows += [{**row(method, 1.0, 0, 90.0), "task": "noise"} for method in ("cosine", "AutoLR")]  # one seed
    assert table(outcomes(rows), "SGD", ["AutoLR"])[2].endswith("| +0.0 (+0.0 .. +0.0), 0.0 | 10% | 1 to 3 |")


def test_a_seed_has_no_say_in_the_rate_that_it_is_compared_with():
    """Without 0 or without 3 the others choose 0.1, without 1 or without 2 they choose 1.0."""
    at = {0.1: (80.0, 95.0, 95.0, 95.0), 1.0: (99.0, 90.0, 90.0, 98.0)}
    rows = [row("cosine", lr, seed, result) for lr, of_lr in at.items() for seed, result in enumerate(of_lr)]
    rows += [row("cosine", 10.0, 0, 99.0)]  # not in the grid
    rows += [row("AutoLR", 1.0, seed, 96.0) for seed in range(4)]
    found = outcomes(rows)
    gains = found["digits", "SGD", "AutoLR"].gains(found["digits", "SGD", "cosine"], held_out=True)
    assert gains[1.0] == {0: 16.0, 1: 6.0, 2: 6.0, 3: 1.0}
    line = held_out_table(found)[2]
    assert line.startswith("| SGD | **+7.2 ± 3.1** |  |")
    worse = [{**each, "result": each["result"] - 20} if each["method"] == "AutoLR" else each for each in rows]
    assert held_out_table(outcomes(worse))[2].startswith("| SGD | **-12.8 ± 3.1** |")
    lost = [{**each, "result": None} if each["method"] == "AutoLR" else each for each in rows]
    assert held_out_table(outcomes(lost))[2].startswith("| SGD | **-")
    assert held_out_table(outcomes(rows[:-2]))[2] == "| SGD |  |  |  |  |  |  |  |  |"


def test_an_error_needs_three_seeds():
    rows = [row("cosine", 1.0, seed, 90.0) for seed in (0, 1, 2)]
    for results in ((91.0, 93.0), (91.0, 93.0, None)):
        of_method = [row("AutoLR", 1.0, seed, result) for seed, result in enumerate(results)]
        gains = outcomes(of_method)["digits", "SGD", "AutoLR"].gains(outcomes(rows)["digits", "SGD", "cosine"])
        assert (error(gains) is None) == (len(results) < 3)


def test_a_change_is_compared_with_the_default_of_the_same_seed_and_start():
    rows = [row(REFERENCE, lr, seed, 80.0 + 10 * seed, scheduling=0.5) for lr in (1e-4, 1.0) for seed in range(3)]
    rows += [row("AutoLR", 10.0, seed, 0.0, scheduling=0.5) for seed in range(3)]  # a start the others have not
    for name, gains in (("every 30", (-2.0, -3.0, -4.0)), ("window 4", (-1.0, 0.0, 2.5)), ("guard 4", (1.5,))):
        rows += [
            row(f"AutoLR, {name}", lr, seed, 80.0 + 10 * seed + change)
            for lr in (1e-4, 1.0)
            for seed, change in enumerate(gains)
        ]
    rows += [row("AutoLR, not guarded", 1.0, seed, 85.0) for seed in (0, 3)]  # a seed the default has not
    rows += [row("AutoLR, window 2", lr, seed, 85.0) for lr, seed in ((1e-2, 0), (1.0, 3))]  # nothing in common
    rows += [row("AutoLR, window 3", lr, seed, 85.0) for lr, seed in ((1e-4, 0), (1.0, 1))]  # no seed of both
    rows += [{**row("AutoLR, window 3", 1.0, 0, 85.0), "task": "noise"}]  # nothing to compare with
    assert variants_table(outcomes(rows), "SGD")[2:] == [
        "| window 2 |  | 2.1 |",
        "| window 3 |  | 2.1 |",
        "| window 4 | +0.5 ± 1.0 | 2.1 |",
        "| not guarded | +5.0 (1 seed) | 2.1 |",
        "| guard 4 | +1.5 (1 seed) | 2.1 |",
        "| every 30 | **-3.0 ± 0.6** | 2.1 |",
    ]


def test_without_a_guard_is_compared_with_the_default_of_the_same_setting():
    rows = [row(REFERENCE, 1.0, seed, 90.0 + seed, batch_size=8) for seed in range(3)]
    rows += [row("AutoLR, not guarded", 1.0, seed, 80.0 + 2 * seed, batch_size=8) for seed in range(3)]
    rows += [row(REFERENCE, 1.0, 0, 10.0), row("AutoLR, not guarded", 1.0, 0, 20.0, length=5)]
    assert unguarded_table(outcomes(rows, batch_size=8))[2].startswith("| SGD | **-9.0 ± 0.6** |  |")
    assert unguarded_table(outcomes(rows, length=5))[2] == "| SGD |  |  |  |  |  |  |"


def test_training_losses_are_those_of_the_lowest_and_of_the_best():
    rows = [row("cosine", lr, 0, 90.0 + lr, loss=lr) for lr in (0.1, 1.0)] + [row("cosine", 3.0, 0, None)]
    rows += [row("cosine", 1e-6, 0, 50.0, loss=0.001)]  # not in the grid
    rows += [row("AutoLR", lr, seed, 92.0, loss=lr + seed) for lr in (1.0, 2.0, 7.0) for seed in (0, 1, 2)]
    assert training_table(outcomes(rows))[2] == "| SGD | 3, 0.1, 1 |  |  |  |  |  |  |  |"


def test_settings_are_compared_with_the_cosine_of_the_same():
    longer, smaller = {"length": 5}, {"batch_size": 8}
    rows = [row("cosine", lr, 0, 90.0 + lr, **longer) for lr in (0.1, 1.0)] + [row("cosine", 0.1, 0, 99.0)]
    rows += [row(REFERENCE, lr, 0, 92.0 + lr, scheduling=0.5, **longer) for lr in (1e-4, 1.0)]
    rows += [row(REFERENCE, 1.0, 0, 50.0, **smaller)]  # to be compared with nothing
    assert settings_table(rows)[2:] == ["| digits, SGD |  | +1.5, 5% |"]


def test_gains_are_points_or_percent():
    assert gain("digits", 90.0, 91.5) == -1.5
    assert gain("lstm", 1.8, 2.0) == pytest.approx(10.0)
    assert gain("lstm", math.inf, 2.0) == -math.inf


def test_two_optimizers_are_compared_with_their_cosine_from_each_start():
    def of_pair(method, lr, seed, result):
        return {**row(method, lr, seed, result), "task": "transformer", "optimizer": MUON_AND_ADAMW}

    rows = [of_pair("cosine", lr, seed, 2.0 + lr) for lr in (0.0003, 0.01) for seed in range(3)]
    rows = [{**each, "result": 2.0} if each["lr"] == 0.01 else each for each in rows]
    rows += [of_pair("AutoLR", 1e-6, seed, 1.9 - 0.02 * seed) for seed in range(3)]
    rows += [of_pair("AutoLR", 1.0, seed, 2.1) for seed in range(3)]
    rows += [{**row("AutoLR", 1.0, 0, 1.0), "task": "transformer"}]  # of one optimizer
    head, _, auto = paired_table(outcomes(rows))
    assert head == "| transformer: 2 at 0.01 | from 1e-06 | from 1 | median | worst |"
    assert auto == "| AutoLR | +6.0 ± 0.6 | -5.0 ± 0.0 | +0.5 ± 0.3 | -5.0 |"


def test_replayed_masks_are_compared_with_others_of_the_same_seed_and_start():
    def dropping(method, lr, seed, result):
        return {**row(method, lr, seed, result), "task": DROPOUT}

    rows = [dropping(AFTER_STEP, lr, seed, 2.0) for lr in (1e-4, 1.0) for seed in range(3)]
    rows += [dropping("AutoLR", lr, seed, 1.9 - 0.02 * seed) for lr in (1e-4, 1.0) for seed in range(3)]
    assert replay_table(outcomes(rows))[2:] == ["| SGD | **+6.0 ± 0.6** | 1.88 | 2 |"]
    assert "| SGD | **+6.0 ± 0.6** |" in page([{**each, "machine": ""} for each in rows], outcomes(rows), [])


def test_what_was_not_run_has_no_section():
    rows = [{**row("cosine", lr, 0, 90.0, loss=0.1), "machine": ""} for lr in TUNED]
    found = outcomes(rows)
    assert paired_table(found) == replay_table(found) == []
    written = page(rows, found, ["AutoLR", "cosine"])
    assert "Two optimizers" not in written
    assert "replayed, or not" not in written
