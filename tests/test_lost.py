"""Steps after the first ones that lose what the training has won: they are taken again."""

import copy
import logging
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR, Rule

from .helpers import assert_same, between, everything, mlp, parameters_of, raise_rate

SPAN = 11  # steps from where averages begin to a probe
SPIKE, PROBED = 38, 40  # the step that loses the training, and one that is probed after it


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 3))

    def forward(self, x):
        return self.body(x)


def start(tensor=False, maximize=False, **options):
    torch.manual_seed(2)
    model = Net()
    lr = torch.tensor(0.05) if tensor else 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, maximize=maximize)
    return model, optimizer, AutoLR(optimizer, model, **{"evaluator": "inplace", **options})


def closure_at(model, optimizer, step, added=0.0):
    """Easy batches, all alike but for their noise."""
    stream = torch.Generator().manual_seed(step)
    x = torch.randn(128, 5, generator=stream)
    y = x[:, :3].argmax(1)
    sign = -1 if optimizer.param_groups[0]["maximize"] else 1
    return lambda: sign * (F.cross_entropy(model(x), y) + added)


def train(parts, steps, history=None, added_at=lambda step: 0.0):
    model, optimizer, scheduler = parts
    for step in steps:
        if history is not None:
            history[step - 1] = parameters_of(model)
        optimizer.zero_grad()
        scheduler.loss(closure_at(model, optimizer, step, added_at(step))).backward()
        optimizer.step()
        yield step
        scheduler.step()


def until_the_probe(parts, times, spoil=lambda model: None):
    """Train to just before the probe, with a step at so many times the rate; return the history."""
    history = {}
    for step in train(parts, range(1, PROBED), history):
        if step == SPIKE - 1:
            parts[2].step()
            raise_rate(parts[2], times)
    spoil(parts[0])
    next(train(parts, [PROBED], history))
    return history


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("times", [300, 1e6])
def test_steps_that_lose_the_training_are_taken_again(times, maximize, caplog):
    """On the line from ten steps before the last; the optimizer begins anew, at half the level, below a ceiling."""
    caplog.set_level(logging.INFO, logger="autolr_fast")
    parts = start(maximize=maximize)
    model, optimizer, scheduler = parts
    history = until_the_probe(parts, times)
    level, lost, lines = scheduler.level[0], parameters_of(model), len(caplog.records)
    closure = closure_at(model, optimizer, PROBED)
    sign = -1 if maximize else 1
    was = sign * closure().item()
    scheduler.step()
    probe = scheduler.last_probe
    assert (probe.step, len(caplog.records)) == (PROBED, lines + 1)
    assert 0 <= probe.retaken < 0.5
    for name, parameter in model.named_parameters():
        expected = between(history[PROBED - SPAN][name], lost[name], probe.retaken)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-5)
    assert sign * closure().item() < was / 2
    assert not optimizer.state
    assert scheduler.level[0] == pytest.approx(level / 2)
    for step in train(parts, range(PROBED + 1, PROBED + 80)):
        ceiling = 0.8 * level * 1.03 ** ((step - PROBED) // 10)
        assert scheduler.level[0] <= ceiling * (1 + 1e-12), step
    assert sign * closure().item() < 0.7 < was


def test_parameters_without_numbers_are_those_of_ten_steps_before_and_statistics_begin_anew():
    parts = start()
    model, optimizer, scheduler = parts

    @torch.no_grad()
    def spoil(model):
        for parameter in model.parameters():
            parameter.fill_(torch.nan)

    history = until_the_probe(parts, 1.0, spoil)
    assert not model.body[2].running_var.isfinite().any()
    scheduler.step()
    assert scheduler.last_probe.retaken == 0.0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, history[PROBED - SPAN][name])
    norm = model.body[2]
    assert (norm.running_mean == 0).all()
    assert (norm.running_var == 1).all()
    assert norm.num_batches_tracked == 0
    assert not optimizer.state
    for step in train(parts, range(PROBED + 1, PROBED + 30)):
        assert all(each.isfinite().all() for each in model.parameters()), step


def test_running_statistics_with_numbers_stay():
    parts = start()
    until_the_probe(parts, 300)
    model, _, scheduler = parts
    before = [buffer.clone() for buffer in model.buffers()]
    scheduler.step()
    assert scheduler.last_probe.retaken is not None
    assert_same(before, list(model.buffers()))


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("tensor", [False, True])
def test_a_batch_that_is_hard_loses_nothing(tensor):
    """Its loss is far above all others, and as high ten steps before."""
    parts, hard = start(tensor), (30, 40, 41, 60)
    for _ in train(parts, range(1, 81), added_at=lambda step: 100.0 if step in hard else 0.0):
        pass
    seen = {probe.step: probe for probe in parts[2].history if probe.step > 20}
    assert sorted(seen) == [30, 40, 50, 60, 70, 80]
    assert all((probe.losses[1] > 100) == (step in hard) for step, probe in seen.items())
    assert not any(probe.retaken is not None for probe in seen.values())
    assert parts[2].state_dict()["level"]["ceiling"] == float("inf")


@pytest.mark.parametrize(
    ("tensor", "options"),
    [(False, {"max_heat": float("inf"), "rule": Rule()}), (False, {"probe_every_steps": None}), (True, {})],
)
def test_where_there_is_no_line_back_or_it_would_wait_parameters_stay(tensor, options, monkeypatch):
    """Without a limit of the heat no line is kept; where rates are on an accelerator nothing is read back."""
    parts = start(tensor, **options)
    until_the_probe(parts, 300)
    model, optimizer, scheduler = parts
    if tensor:
        monkeypatch.setattr(type(scheduler._level.value), "is_cpu", False, raising=False)
        monkeypatch.setattr(scheduler._calibration, "find_later", None)
    before = everything(model, optimizer)
    scheduler.step()
    assert_same(before, everything(model, optimizer))
    assert scheduler.state_dict()["level"]["ceiling"] == float("inf")


def test_a_tensor_rate_on_the_cpu_is_lowered_too():
    parts = start(tensor=True)
    until_the_probe(parts, 300)
    _, optimizer, scheduler = parts
    rate, level = optimizer.param_groups[0]["lr"], scheduler.level[0]
    scheduler.step()
    assert scheduler.last_probe.retaken is not None
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(level / 2)


@pytest.mark.parametrize("cut", [29, 36, 39, 40, 55])
def test_a_run_that_was_cut_around_it_is_the_same(cut):
    """Bit for bit: before the window opens, inside of it, and after the steps were taken again."""

    def go_on(parts, steps):
        for step in steps:
            if step == SPIKE:
                raise_rate(parts[2], 300)
            for _ in train(parts, [step]):
                pass

    whole = start(total_steps=200)
    go_on(whole, range(1, cut + 1))
    states = copy.deepcopy([each.state_dict() for each in whole])
    go_on(whole, range(cut + 1, 71))
    assert {probe.step for probe in whole[2].history if probe.retaken is not None} == {1, PROBED}
    resumed = start(total_steps=200)
    for each, state in zip(resumed, states, strict=True):
        each.load_state_dict(state)
    go_on(resumed, range(cut + 1, 71))
    assert_same(everything(*whole[:2]), everything(*resumed[:2]))
    assert str(resumed[2].state_dict()) == str(whole[2].state_dict())


@pytest.mark.parametrize("raise_at", [1, 2, 3, 5, 8])
def test_a_closure_that_raises_meanwhile_loses_nothing(raise_at):
    parts, calls = start(), []
    until_the_probe(parts, 300)
    model, optimizer, scheduler = parts
    twin = start()
    until_the_probe(twin, 300)
    twin[2].step(closure_at(*twin[:2], PROBED))
    closure, before, state = (
        closure_at(model, optimizer, PROBED),
        everything(model, optimizer),
        scheduler.state_dict(),
    )

    def raising():
        calls.append(1)
        if len(calls) == raise_at:
            raise OSError("no data")
        return closure()

    with pytest.raises(OSError, match="no data"):
        scheduler.step(raising)
    assert_same(before, everything(model, optimizer))
    for key in ("level", "calibration", "snapshots"):
        assert str(scheduler.state_dict()[key]) == str(state[key])
    scheduler.step(closure)
    assert scheduler.last_probe.retaken is not None
    assert_same(everything(model, optimizer), everything(*twin[:2]))


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9), torch.optim.SGD])
@pytest.mark.parametrize("bad", [2, 4, 13])
def test_one_batch_without_numbers_among_the_first_undoes_one_step(make, bad):
    """The states of optimizers would keep what is no number, and every later step would be undone."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = make(model.parameters(), lr=1e-3)
    scheduler = AutoLR(optimizer, model, total_steps=100)
    for step in range(1, 41):
        x = torch.randn(32, 5)
        y = x[:, :3].argmax(1)
        if step == bad:
            x[0, 0] = math.nan
        optimizer.zero_grad()
        loss = scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y))
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert [probe.step for probe in scheduler.history if probe.retaken == 0] in ([bad], [bad + 1])
    assert loss.item() < 0.8
