import copy
import io

import pytest
import torch
from torch import nn

from autolr_fast import FACTORS_5, AutoLR, InPlace
from autolr_fast.candidates import StepLine
from autolr_fast.reconstruction import StateLine, sample, tells
from autolr_fast.snapshots import Cadence, Snapshots

from .helpers import ON_GPU, mlp, parameters_of, problem, sgd, train_step


@pytest.fixture(autouse=True)
def _small_parameters_are_told_too(monkeypatch):
    monkeypatch.setattr("autolr_fast.memory.SMALL", 0)


# name -> (optimizer, the longest window that its state tells)
TOLD = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05), 1),
    "sgd-decay": (lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1), 1),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 2),
    "momentum-decay": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, dampening=0.3), 2),
    "momentum-maximize": (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, maximize=True), 2),
    "momentum-fused": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True), 2),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1), 1),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1), 1),
    "adam-maximize": (lambda p: torch.optim.Adam(p, lr=0.01, maximize=True, foreach=True), 1),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), 1),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True), 1),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), 0),
    "rmsprop": (torch.optim.RMSprop, 0),
    "tensor-lr": (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.05), momentum=0.9), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(TOLD))
def test_state_tells_the_steps_taken(name, dtype):
    make, longest = TOLD[name]
    model, loss_of = problem("mlp")
    if dtype == torch.float64:
        model, x = model.double(), torch.randn(12, 5, dtype=dtype)
        loss_of = lambda model: model(x).square().mean()  # noqa: E731
    optimizer = make(model.parameters())
    assert [window for window in (1, 2, 3) if tells(optimizer, window)] == list(range(1, longest + 1))
    parameters = list(model.parameters())
    history, lrs = [], []
    for step in range(1, 8):
        history.append([p.detach().clone() for p in parameters])
        optimizer.param_groups[0]["lr"] *= 1.3
        lrs.append([optimizer.param_groups[0]["lr"]])
        train_step(model, optimizer, loss_of)
        for window in range(1, min(longest, step) + 1):
            line = StateLine(optimizer, lrs, window, parameters, set(parameters))
            before = history[step - window]
            assert line.agrees(dict(zip(parameters, map(sample, before), strict=True)))
            all_rows = [torch.empty(len(FACTORS_5), *p.shape, dtype=dtype) for p in parameters]
            line.writer([p.detach() for p in parameters], all_rows)(FACTORS_5)
            for index, (parameter, prev, rows) in enumerate(zip(parameters, before, all_rows, strict=True)):
                now, eps = parameter.detach(), torch.finfo(dtype).eps
                atol = (16 if ON_GPU else 8) * eps * max(now.abs().max(), prev.abs().max()).item()
                torch.testing.assert_close(line.direction(index, now), now - prev, rtol=0, atol=atol)
                expected = torch.stack([torch.lerp(prev, now, factor) for factor in FACTORS_5])
                torch.testing.assert_close(rows, expected, rtol=0, atol=4 * atol)
                assert torch.equal(rows[FACTORS_5.index(1.0)], now)


def test_small_parameters_are_copied(monkeypatch):
    model = mlp()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    for small, told in ((size, False), (size - 1, True)):
        monkeypatch.setattr("autolr_fast.memory.SMALL", small)
        assert tells(sgd(model, momentum=0.9), 2) == told


def test_half_precision_is_not_told():
    assert not tells(sgd(mlp().bfloat16(), momentum=0.9), 1)


def test_a_default_run_with_momentum_keeps_samples_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    loss_of = lambda model: nn.functional.cross_entropy(model(x), y)  # noqa: E731
    optimizer = sgd(model, lr=0.01, momentum=0.9)
    scheduler = AutoLR(optimizer, model, every=5, calibrate=4, evaluator="inplace")
    held, probes = [], []
    for _ in range(20):
        train_step(model, optimizer, loss_of)
        taken = scheduler._snapshots._taken.values()
        held.append(sum(value.numel() for snapshot in taken for value in snapshot.values.values()))
        scheduler.step(lambda: loss_of(model))
        probes.append(scheduler.last_probe.step)
    assert sorted(set(probes)) == [1, 2, 3, 4, 5, 10, 15, 20]
    assert held[0] == sum(
        p.numel() for p in model.parameters()
    )  # that of the first step is whole, for its own probe
    assert 0 < max(held[1:]) <= 2 * 4 * 127


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_reset_before_the_probe(momentum, to_none):
    """The first probe finds its rate all the same, and soon whole parameters are kept."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.01, momentum=momentum)
    scheduler = AutoLR(optimizer, model, every=1, calibrate=6, evaluator="inplace")
    probed = []
    for _ in range(8):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        scheduler.step(lambda: loss_of(model))
        probed.append(scheduler.last_probe.step)
        if probed[-1] == len(probed) == 1:
            assert scheduler.last_probe.rounds > 1
    assert probed[0] == 1
    assert probed[-4:] == [5, 6, 7, 8]
    assert not scheduler._snapshots._state_tells


def test_parameters_changed_behind_the_optimizer_are_noticed():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.01, momentum=0.9)
    snapshots = Snapshots(optimizer, Cadence(every=1, calibrate=0, windows=(1,)))
    names = dict.fromkeys(model.parameters(), "")
    train_step(model, optimizer, loss_of)
    assert isinstance(snapshots.line(optimizer, 1, names), StateLine)
    train_step(model, optimizer, loss_of)
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)
    assert snapshots.line(optimizer, 1, names) is None
    train_step(model, optimizer, loss_of)
    assert isinstance(snapshots.line(optimizer, 1, names), StepLine)


def test_frozen_and_unused_parameters_stand_still():
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    x = torch.randn(8, 5)
    optimizer = sgd(model, lr=0.1, momentum=0.9)
    snapshots = Snapshots(optimizer, Cadence(every=1, calibrate=0, windows=(1,)))
    for _ in range(2):
        train_step(model, optimizer, lambda model: model[0](x).square().mean())
        line = snapshots.line(optimizer, 1, {})
        assert isinstance(line, StateLine)
        losses = InPlace().losses(model, line, (3.0, 1.0), lambda: model[1](x).square().mean())
        assert losses[0] == losses[1]


def test_a_step_taken_again_is_told_at_its_own_rate():
    """Calibration moves the first step; the line over the first two must know."""
    model, loss_of = problem("convnet")
    optimizer = sgd(model, lr=1e-4, momentum=0.9)
    scheduler = AutoLR(optimizer, model, window=2, evaluator="inplace")
    start = parameters_of(model)
    for _ in range(2):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    assert (scheduler.last_probe.step, scheduler.last_probe.window) == (2, 2)
    candidate = copy.deepcopy(model)
    factor = scheduler.last_probe.factors[0]
    with torch.no_grad(), torch.random.fork_rng():
        for name, parameter in candidate.named_parameters():
            parameter.copy_(torch.lerp(start[name], parameter, factor))
        expected = loss_of(candidate).item()
    assert scheduler.last_probe.losses[0].item() == pytest.approx(expected, rel=1e-4)


def test_state_of_an_open_window_is_small():
    model = nn.Linear(1000, 100)
    x = torch.randn(4, 1000)
    optimizer = sgd(model, lr=1e-3, momentum=0.9)
    scheduler = AutoLR(optimizer, model, every=10, window=2, calibrate=0)
    for _ in range(9):
        train_step(model, optimizer, lambda model: model(x).square().mean())
        scheduler.step()
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    assert scheduler.state_dict()["snapshots"]["taken"][8]["sampled"]
    assert file.tell() < 6000
