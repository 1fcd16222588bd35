import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autolr_fast import AutoLR, Rule
from autolr_fast._level.guard import Guard

from .helpers import problem, sgd


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@given(
    stretches=st.lists(
        st.tuples(
            st.sampled_from((-3.0, 0.0, 0.999, 1.0, 1.001, 4.0)),
            st.lists(st.tuples(st.floats(0.0, 1e-4), st.sampled_from((0.5, 2.0))), min_size=1, max_size=8),
        ),
        min_size=1,
        max_size=8,
    ),
    count=st.integers(2, 6),
)
def test_the_level_goes_where_it_has_not_been_only_while_the_mean_reaches_clear_new_lows(stretches, count):
    guard, level = Guard(count, torch.device("cpu")), number(1.0)
    losses, levels, means = [], [0.0], []
    for base, probes in stretches:
        for more, factor in probes:
            losses.append(base + more)
            wanted = level.item() * factor
            level, _ = guard.hold(level * factor, number(losses[-1]))
            allowed, half = True, min(count, len(losses) // 2)
            if half >= 2:
                older, newer = losses[-2 * half : -half], losses[-half:]
                error = math.sqrt((statistics.variance(older) + statistics.variance(newer)) / half)
                if half == count:
                    means.append(statistics.fmean(older))
                gain = min([statistics.fmean(older), *means]) - statistics.fmean(newer)
                least = max(2 * error, 1e-3 * (losses[0] - statistics.fmean(newer)))
                if math.isclose(gain, least, rel_tol=1e-9, abs_tol=1e-12):  # rounding decides
                    return
                allowed = gain > least
            assert level.item() == (wanted if allowed else min(wanted, max(levels)))
            levels.append(level.item())


def test_what_is_won_back_is_no_new_low():
    guard, level = Guard(2, torch.device("cpu")), number(1.0)
    levels = []
    for loss in (4.0, 3.0, 2.0, 1.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.9, 0.4, 0.39):
        level, _ = guard.hold(2 * level, number(loss))
        levels.append(level.item())
    assert levels == [2.0, 4.0, 8.0, *[16.0] * 12, 32.0]


def test_a_mean_of_few_is_no_low_to_go_below():
    guard, level = Guard(4, torch.device("cpu")), number(1.0)
    for loss in (0.1, 0.1, *[5.0] * 6):
        level, _ = guard.hold(level, number(loss))
    for _ in range(4):
        level, _ = guard.hold(2 * level, number(1.0))
    assert level.item() == 2.0  # at the fourth


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-6, 0.0), (1e3, -7.0)])
def test_the_last_thousandth_of_the_loss_is_worth_no_higher_level(scale, offset):
    guard, level = Guard(2, torch.device("cpu")), number(1.0)
    levels = []
    for loss in (1.0, 0.5, 0.1, 0.01, 0.0095, 0.0001, 0.00005, -0.0005, -0.002):
        level, _ = guard.hold(level, number(scale * loss + offset))
        level, _ = guard.hold(2 * level, number(scale * loss + offset))
        levels.append(level.item())
    assert levels == [2.0, 4.0, 8.0, 16.0, 16.0, 32.0, 32.0, 32.0, 64.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_holds_the_level_until_it_is_forgotten(bad):
    guard, level = Guard(2, torch.device("cpu")), number(1.0)
    levels = []
    for loss in (9.0, 8.0, 7.0, bad, 5.0, 4.0, 3.0, 2.0, 1.0):
        level, _ = guard.hold(2 * level, number(loss))
        levels.append(level.item())
    assert levels == [2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 16.0, 32.0]


def test_a_guard_goes_on_from_its_state():
    stretches = ((4.0, 1.0), (9.0, 0.5), (0.45, 0.449))  # that is lost and won back, and hardly falls at last
    losses = torch.cat([torch.linspace(*stretch, 14, dtype=torch.float64) for stretch in stretches])
    factors = [2.0, 2.0, 0.5] * 14
    for cut in (0, 2, 11, 18, 34):
        whole, resumed = Guard(3, torch.device("cpu")), Guard(3, torch.device("cpu"))
        level = number(1.0)
        for loss, factor in zip(losses[:cut], factors[:cut], strict=True):
            level, _ = whole.hold(level * factor, loss)
        resumed.load(json.loads(json.dumps(whole.state())))
        other = level.clone()
        for loss, factor in zip(losses[cut:], factors[cut:], strict=True):
            level, falls = whole.hold(level * factor, loss)
            other, others_falls = resumed.hold(other * factor, loss)
            assert (level, falls) == (other, others_falls)


def train(loss_of_step, maximize=False, **options):
    """Return the level after each of 120 probes along a line whose longest step always has the lowest loss."""
    model = nn.ParameterDict({"w": nn.Parameter(number(0.0))})
    optimizer = sgd(model, lr=1e-3, maximize=maximize)
    scheduler = AutoLR(
        optimizer,
        model,
        calibration_steps=0,
        probe_every_steps=1,
        rule=Rule(window_steps=1),
        evaluator="inplace",
        **options,
    )
    sign = -1 if maximize else 1
    levels = []
    for step in range(120):
        start, lr = model["w"].item(), optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        (-sign * model["w"]).backward()
        optimizer.step()

        def closure(step=step, start=start, lr=lr):
            factor = ((model["w"] - start) / lr).mul(1e6).round().div(1e6)  # without rounding errors
            return sign * (loss_of_step(step) - 1e-3 * factor)

        scheduler.step(closure)
        levels.append(scheduler.level[0])
    return levels


@pytest.mark.parametrize("maximize", [False, True])
def test_autolr_climbs_while_the_loss_falls_and_no_longer(maximize):
    levels = train(lambda step: max(1.0, 5.0 - 0.1 * step), maximize)
    assert levels[39] > 1e3 * levels[0]
    assert levels[119] == levels[60]  # twenty probes after the last fall there is none left to see


def test_without_a_guard_it_climbs_on():
    levels = train(lambda step: 1.0, guard_probes=0)
    assert levels[60] == pytest.approx(levels[59] * levels[1] / levels[0])
    assert train(lambda step: 1.0)[119] == train(lambda step: 1.0)[19]


@pytest.mark.parametrize(
    ("guard", "error"), [(-1, ValueError), (1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_what_cannot_be_a_guard_is_refused(guard, error):
    model, _ = problem("mlp")
    with pytest.raises(error, match="guard_probes="):
        AutoLR(sgd(model), model, guard_probes=guard)
