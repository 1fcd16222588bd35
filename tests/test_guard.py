import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autolr_fast import AutoLR
from autolr_fast.guard import Guard

from .helpers import problem, sgd


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@given(
    losses=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30),
    count=st.integers(2, 6),
    rises=st.booleans(),
)
def test_the_level_rises_only_while_the_mean_falls_by_more_than_two_errors(losses, count, rises):
    guard = Guard(count, torch.device("cpu"))
    for seen, loss in enumerate(losses, start=1):
        before = number(1.0)
        level = number(2.0 if rises else 0.5)
        guard.hold(number(loss), before, level)
        allowed = True
        half = min(count, seen // 2)
        if half >= 2:
            older, newer = losses[seen - 2 * half : seen - half], losses[seen - half : seen]
            error = math.sqrt((statistics.variance(older) + statistics.variance(newer)) / half)
            gain = statistics.fmean(older) - statistics.fmean(newer)
            if math.isclose(gain, 2 * error, rel_tol=1e-9, abs_tol=1e-12):  # rounding decides
                continue
            allowed = gain > 2 * error
        assert level.item() == (2.0 if rises and allowed else 1.0 if rises else 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_holds_the_level_until_it_is_forgotten(bad):
    guard = Guard(2, torch.device("cpu"))
    levels = []
    for loss in (9.0, 8.0, 7.0, bad, 5.0, 4.0, 3.0, 2.0, 1.0):
        level = number(2.0)
        guard.hold(number(loss), number(1.0), level)
        levels.append(level.item())
    assert levels == [2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]


def test_a_guard_goes_on_from_its_state():
    losses = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Guard(3, torch.device("cpu"))
    for cut in (2, 11):
        whole, resumed = Guard(3, torch.device("cpu")), Guard(3, torch.device("cpu"))
        for loss in losses[:cut]:
            whole.hold(loss, number(1.0), number(2.0))
        resumed.load(whole.state())
        for loss in losses[cut:]:
            levels = [number(2.0), number(2.0)]
            for guard, level in zip((whole, resumed), levels, strict=True):
                guard.hold(loss, number(1.0), level)
            assert levels[0] == levels[1]


def train(loss_of_step, maximize=False, **options):
    """Return the level after each of 120 probes along a line whose longest step always has the lowest loss."""
    model = nn.ParameterDict({"w": nn.Parameter(number(0.0))})
    optimizer = sgd(model, lr=1e-3, maximize=maximize)
    scheduler = AutoLR(optimizer, model, calibrate=0, every=1, window=1, evaluator="inplace", **options)
    sign = -1 if maximize else 1
    levels = []
    for step in range(120):
        start, lr = model["w"].item(), optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        (-sign * model["w"]).backward()
        optimizer.step()
        scheduler.step(
            lambda step=step, start=start, lr=lr: sign * (loss_of_step(step) - 1e-3 * (model["w"] - start) / lr)
        )
        levels.append(scheduler.level[0])
    return levels


@pytest.mark.parametrize("maximize", [False, True])
def test_autolr_climbs_while_the_loss_falls_and_no_longer(maximize):
    levels = train(lambda step: max(1.0, 5.0 - 0.1 * step), maximize)
    assert levels[39] > 1e3 * levels[0]
    assert levels[119] == levels[60]  # twenty probes after the last fall there is none left to see


def test_without_a_guard_it_climbs_on():
    levels = train(lambda step: 1.0, guard=0)
    assert levels[60] == pytest.approx(levels[59] * levels[1] / levels[0])
    assert train(lambda step: 1.0)[119] == train(lambda step: 1.0)[19]


@pytest.mark.parametrize(
    ("guard", "error"), [(-1, ValueError), (1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_what_cannot_be_a_guard_is_refused(guard, error):
    model, _ = problem("mlp")
    with pytest.raises(error, match="guard="):
        AutoLR(sgd(model), model, guard=guard)
