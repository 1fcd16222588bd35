import copy
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


# The alarm: a training that is about to be lost


BEFORE = [(10.0, 1.0), (2.0, 0.02)]  # fallen by 8, of which a fifth is 1.6; three standard errors are 0.6


@pytest.mark.parametrize(
    ("seen", "left"),
    [
        # a fifth of what it has fallen decides
        ([*BEFORE, (3.599, 0.02)], 1.0),
        ([*BEFORE, (3.601, 0.02)], 0.5),
        # three standard errors of a difference decide: 3 * sqrt(2 * variance) of the mean before
        ([(10.0, 1.0), (2.0, 2.0), (7.999, 0.02)], 1.0),
        ([(10.0, 1.0), (2.0, 2.0), (8.001, 0.02)], 0.5),
        ([(10.0, 1.0), (2.0, 2.0), (8.001, 1e6)], 0.5),
        # what has not fallen has nothing to lose but noise
        ([(2.0, 0.02), (2.599, 0.02)], 1.0),
        ([(2.0, 0.02), (2.601, 0.02)], 0.5),
        ([(2.0, 1.0), (10.0, 0.02), (10.599, 0.02)], 1.0),
        ([(2.0, 1.0), (10.0, 0.02), (10.601, 0.02)], 0.5),
        # all losses were the same
        ([(10.0, 0.0), (2.0, 0.0), (3.599, 0.0)], 1.0),
        ([(10.0, 0.0), (2.0, 0.0), (3.601, 0.0)], 0.5),
        ([(2.0, 0.0), (2.0, 0.0)], 1.0),
        # the variance before is not known
        ([(10.0, 1.0), (2.0, None), (1e9, 0.02)], 1.0),
        ([(10.0, 1.0), (2.0, math.nan), (1e9, 0.02)], 1.0),
        ([(10.0, 1.0), (2.0, math.inf), (1e9, 0.02)], 1.0),
        ([(10.0, 1.0), (2.0, -math.inf), (1e9, 0.02)], 1.0),
        ([*BEFORE, (2.0, None), (1e9, 0.02)], 1.0),
        # that of the probe itself is not needed
        ([*BEFORE, (3.601, None)], 0.5),
        ([*BEFORE, (3.601, math.nan)], 0.5),
        # a loss is not finite
        ([*BEFORE, (math.nan, 0.02)], 1.0),
        ([*BEFORE, (math.inf, 0.02)], 0.5),
        ([*BEFORE, (math.nan, 0.02), (1e9, 0.02)], 1.0),
        ([*BEFORE, (math.inf, 0.02), (1e9, 0.02)], 1.0),
        ([(math.nan, 0.02), (2.0, 0.02)], 1.0),
        ([(math.inf, 1.0), *BEFORE, (3.599, 0.02)], 1.0),
        ([(math.inf, 1.0), *BEFORE, (3.601, 0.02)], 0.5),
        # the first probe
        ([(1e9, 0.02)], 1.0),
        ([(1e9, 0.0)], 1.0),
    ],
)
@pytest.mark.parametrize("probes", [0, 2, 10])
def test_the_level_is_halved_where_the_mean_loss_rises(probes, seen, left):
    """By more than three standard errors, and a fifth of what it has fallen; the ceiling stays, as does falls."""
    guard, without = (Guard(probes, torch.device("cpu")) for _ in range(2))
    for loss, variance in seen:
        level, falls = guard.hold(number(3.0), number(loss), None if variance is None else number(variance))
        expected, others_falls = without.hold(number(3.0), number(loss))
    assert level == (left if probes else 1.0) * expected
    assert str(falls) == str(others_falls)
    assert guard.state()["ceiling"] == without.state()["ceiling"]


@given(
    seen=st.lists(
        st.tuples(
            st.sampled_from((-3.0, 0.0, 0.9, 1.0, 1.1, 4.0, math.nan, math.inf)),
            st.sampled_from((None, 0.0, 1e-4, 0.03, 1.0, math.nan)),
            st.sampled_from((0.5, 1.0, 2.0)),
        ),
        min_size=1,
        max_size=24,
    ),
    count=st.integers(2, 6),
)
def test_an_alarm_halves_what_the_guard_allows(seen, count):
    guard, without = (Guard(count, torch.device("cpu")) for _ in range(2))
    level, before, first = number(1.0), (math.nan, None), math.nan
    for loss, variance, factor in seen:
        expected, _ = without.hold(level * factor, number(loss))
        level, _ = guard.hold(level * factor, number(loss), None if variance is None else number(variance))
        rise, error = loss - before[0], 3 * math.sqrt(2 * (before[1] or 0.0))
        known = before[1] is not None and not math.isnan(before[1])
        fifth = (first - before[0]) / 5
        if any(math.isclose(rise, bound, rel_tol=1e-9) for bound in (error, fifth)):  # rounding decides
            return
        assert level == expected * (0.5 if known and rise > error and rise > fifth else 1.0)
        before = loss, variance
        first = first if math.isfinite(first) else loss


@pytest.mark.parametrize("cut", range(4))
def test_an_alarm_goes_on_from_the_state(cut):
    seen = [(10.0, 1.0), (2.0, 0.02), (3.7, 0.3), (9.0, 0.3)]
    whole, resumed = Guard(3, torch.device("cpu")), Guard(3, torch.device("cpu"))
    for loss, variance in seen[:cut]:
        whole.hold(number(1.0), number(loss), number(variance))
    resumed.load(json.loads(json.dumps(whole.state())))
    levels = [
        [guard.hold(number(1.0), number(loss), number(variance))[0].item() for loss, variance in seen[cut:]]
        for guard in (whole, resumed)
    ]
    assert levels == [[1.0, 1.0, 0.5, 0.5][cut:]] * 2


STEPS, EVERY, JUMP = 60, 5, 24


def on_a_slope_that_steepens(maximize, guard_probes=1000):
    """Plain SGD on a quadratic whose curvature is twelve times as high from a step on."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))})
    optimizer = sgd(model, lr=0.2, maximize=maximize)
    scheduler = AutoLR(
        optimizer,
        model,
        calibration_steps=0,
        probe_every_steps=EVERY,
        guard_probes=guard_probes,
        evaluator="inplace",
    )
    return model, optimizer, scheduler


def go_on(model, optimizer, scheduler, steps):
    """Train; return the losses and the levels."""
    sign = -1 if optimizer.param_groups[0]["maximize"] else 1
    losses, levels = [], []
    for step in steps:
        curvature = 1.0 if step < JUMP else 12.0
        optimizer.zero_grad()
        loss = scheduler.loss(
            lambda curvature=curvature, noise=0.05 * (-1) ** step: (
                sign * (curvature * model["w"].square().sum() / 2 + 1 + noise)
            )
        )
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(sign * loss.item())
        levels.append(scheduler.level[0])
    return losses, levels


@pytest.mark.parametrize("maximize", [False, True])
def test_a_loss_that_blows_up_between_two_probes_is_caught(maximize):
    """The level is halved where the losses of the loop say so, and nowhere else; without a guard all is lost."""
    whole = on_a_slope_that_steepens(maximize)
    losses, levels = go_on(*whole, range(1, STEPS + 1))
    without, level, halved, means = Guard(1000, torch.device("cpu")), number(0.2), [], []
    for end in range(EVERY, STEPS + 1, EVERY):
        parts = losses[end - EVERY : end]
        means.append((statistics.fmean(parts), statistics.variance(parts) / EVERY))
        allowed, _ = without.hold(level * whole[2].history[len(means) - 1].factor, number(means[-1][0]))
        if len(means) > 1:
            (before, variance), (first, _) = means[-2], means[0]
            rise = means[-1][0] - before
            if rise > 3 * math.sqrt(2 * variance) and rise > (first - before) / 5:
                halved.append(end)
                allowed = allowed / 2
        assert levels[end - 1] == pytest.approx(allowed.item(), rel=1e-12)
        level = number(levels[end - 1])
    assert halved == [30, 35]
    assert max(losses[-EVERY:]) < 1.1
    losses, _ = go_on(*on_a_slope_that_steepens(maximize, guard_probes=0), range(1, STEPS + 1))
    assert min(losses[-EVERY:]) > 1e9


@pytest.mark.parametrize("cut", [25, 28, 29, 30, 34])
def test_a_run_that_was_cut_right_before_an_alarm_is_the_same(cut):
    """Bit for bit: the variance of the losses before, and the losses since, are in the state."""
    model, optimizer, scheduler = on_a_slope_that_steepens(maximize=False)
    go_on(model, optimizer, scheduler, range(1, cut + 1))
    states = copy.deepcopy([each.state_dict() for each in (model, optimizer, scheduler)])
    expected = go_on(model, optimizer, scheduler, range(cut + 1, STEPS + 1))
    resumed = on_a_slope_that_steepens(maximize=False)
    for each, state in zip(resumed, states, strict=True):
        each.load_state_dict(state)
    assert go_on(*resumed, range(cut + 1, STEPS + 1)) == expected
    assert resumed[2].state_dict() == scheduler.state_dict()


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
