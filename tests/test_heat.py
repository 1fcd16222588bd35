"""Heat and gain: against losses whose means have a formula, a table of moves, and deep copies."""

import json
import math
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autolr_fast import AutoLR, Rule
from autolr_fast._level import Level
from autolr_fast._level.heat import Heat
from autolr_fast._level.scalars import scalars_of
from autolr_fast._optimizers import Optimizers

from .helpers import (
    MEAN_AT,
    NAMED,
    assert_same,
    between,
    everything,
    losses_of_copies,
    mlp,
    moved_by_heat,
    parameters_of,
    problem,
    sgd,
    train_step,
)

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def heat_of(heats=(), gain=1.0, limit=0.3):
    """A heat that has seen some, and losses whose means differ as those of a log law with that gain do."""
    heat = Heat(limit, CPU)
    slope = gain / math.log(2)
    heat.load({**heat.state(), "means": [slope / 2, slope / 4], "step": 100})
    for each in heats:
        heat.add_heat(number(each))
    return heat


# The gain


def gain_by_hand(losses):
    """The same from one loss a step: their means by weights of s and s ** 3, made to fit a logarithm."""
    steps = numpy.arange(1, len(losses) + 1)
    edges = numpy.stack([(steps - 1) ** power for power in (2, 4)]), numpy.stack([steps**power for power in (2, 4)])
    weights = edges[1] - edges[0]
    older, newer = (weights * losses).sum(1) / weights.sum(1)
    return 4 * math.log(2) * (older - newer)


LAWS = {
    "log": lambda s: 5 - 0.3 * numpy.log(s),
    "power": lambda s: 1 + 2 * s**-0.3,
    "steep power": lambda s: s**-1.5,
    "flat": lambda s: 0 * s + 2.0,
    "rising": lambda s: numpy.log1p(s),
}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_the_gain_is_that_of_the_law(law):
    """A log law falls by a constant in a doubling; of any other, two doublings enclose the gain."""
    steps = numpy.arange(1.0, 4001.0)
    losses = LAWS[law](steps)
    heat = Heat(0.3, CPU)
    for step, loss in zip(steps, losses, strict=True):
        heat.add_loss(number(loss), int(step))
    assert heat.gain.item() == pytest.approx(gain_by_hand(losses), rel=1e-9, abs=1e-12)
    falls = [LAWS[law](end / 2) - LAWS[law](end) for end in (steps[-1] / 4, steps[-1])]
    slack = 0.01 * max(map(abs, falls)) + 1e-12
    assert min(falls) - slack <= heat.gain.item() <= max(falls) + slack


@given(
    losses=st.lists(st.floats(-10, 10), min_size=1, max_size=30),
    gaps=st.lists(st.integers(1, 20), min_size=30, max_size=30),
    bad=st.sets(st.integers(0, 29)),
)
def test_means_over_several_steps_weigh_as_their_steps(losses, gaps, bad):
    """As if each step had had the mean; a mean that is not finite says nothing, and its steps go to no other."""
    heat, step, expected = Heat(0.3, CPU), 0, None
    for index, (loss, gap) in enumerate(zip(losses, gaps, strict=False)):
        begin, step = step, step + gap
        heat.add_loss(number(NAN if index in bad else loss), step)
        if index in bad:
            continue
        if expected is None:
            expected = [loss, loss]
            continue
        for which, power in enumerate((2, 4)):
            share = (step**power - begin**power) / step**power
            expected[which] = (1 - share) * expected[which] + share * loss
    if expected is None:
        assert math.isnan(heat.gain)
    else:
        assert heat.state()["means"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-6, 0.0), (1e3, 0.0), (1.0, -7.0), (16.0, 64.0)])
def test_scaling_a_loss_or_adding_to_it_moves_nothing(scale, offset):
    draw, moves = random.Random(0), {}
    for times, more in ((1.0, 0.0), (scale, offset)):
        draw.seed(3)
        heat, moved = Heat(0.3, CPU), []
        for step in range(10, 400, 10):
            heat.add_loss(number(times * (step**-0.3 + 0.01 * draw.random()) + more), step)
            heat.add_heat(number(times * draw.gauss(0.03, 0.03)))
            moved.append(heat.temper(number(1.2)).item())
        moves[times, more] = moved
    one, other = moves[1.0, 0.0], moves[scale, offset]
    assert len(set(one)) > 5
    assert other == pytest.approx(one, rel=1e-6)


# The move


MOVES = [
    # heats in units of the gain, of which the limit is 0.3; gain; the rule asks for; the level moves by
    ([0.3] * 5, 1.0, 1.2, 1.0),
    ([0.3 / 1.2**4] * 5, 1.0, 1.2, 1.2),
    ([0.15] * 5, 1.0, 1.2, 2**0.25),
    ([1e-5] * 5, 1.0, 1.2, 1.5),
    ([0.0] * 5, 1.0, 1.2, 1.5),
    ([-1.0] * 5, 1.0, 1.2, 1.5),
    ([0.3 * 1.21] * 5, 1.0, 1.2, 1 / 1.1),
    ([3.0] * 5, 1.0, 1.2, 1 / 1.5),
    # a rule that asks for less is heard
    ([0.15] * 5, 1.0, 1 / 1.2, 1 / 1.2),
    ([0.0] * 5, 1.0, 1 / 1.2, 1 / 1.2),
    ([0.3 * 1.21] * 5, 1.0, 1 / 1.2, 1 / 1.2),
    ([3.0] * 5, 1.0, 1 / 1.2, 1 / 1.5),
    ([3.0] * 5, 1.0, 0.1, 0.1),
    ([0.15] * 5, 1.0, 1.0, 1.0),
    # nothing is won: any heat is too much, and none is none
    ([1e-9] * 5, 0.0, 1.2, 1 / 1.5),
    ([1e-9] * 5, -1.0, 1.2, 1 / 1.5),
    ([0.0] * 5, -1.0, 1.2, 1.5),
    ([-0.1] * 5, 0.0, 1.2, 1.5),
    # the median of the last five
    ([9.0, 9.0, 0.15, 0.15, 0.15], 1.0, 1.2, 2**0.25),
    ([9.0, 9.0, 9.0, 0.15, 0.15], 1.0, 1.2, 1 / 1.5),
    ([9.0, 9.0, 9.0, 0.15, 0.15, 0.15], 1.0, 1.2, 2**0.25),
    # three at least; of an even number the upper one; what is not finite says nothing
    ([], 1.0, 1.2, 1.2),
    ([9.0, 9.0], 1.0, 1.2, 1.2),
    ([9.0, 9.0, 9.0], 1.0, 1.2, 1 / 1.5),
    ([0.15, 0.15, 9.0, 9.0], 1.0, 1.2, 1 / 1.5),
    ([0.15, NAN, INF, -INF, 0.15], 1.0, 1.2, 1.2),
    ([0.15, NAN, 0.15, INF, 0.15], 1.0, 1.2, 2**0.25),
    ([9.0] * 5 + [NAN] * 3, 1.0, 1.2, 1.2),
    # the gain is not known
    ([9.0] * 5, NAN, 1.2, 1.2),
]


@pytest.mark.parametrize(("heats", "gain", "asked", "moved"), MOVES)
def test_the_level_moves_by_the_heat_in_units_of_the_gain(heats, gain, asked, moved):
    heat = heat_of(heats, gain)
    assert heat.temper(number(asked)).item() == pytest.approx(moved, rel=1e-9)
    assert Heat(INF, CPU).temper(number(asked)) == asked
    last = [each if math.isfinite(each) else NAN for each in heats[-5:]]
    assert moved_by_heat(asked, last, heat.state(), 0.3) == pytest.approx(moved, rel=1e-9)


@pytest.mark.parametrize("asked", [1.2, 1.0, 0.9])
def test_the_level_rises_only_while_the_recent_mean_is_at_its_lowest(asked):
    heat, moves = heat_of([0.01] * 5), []
    heat.load({**heat.state(), "means": [5.0, 5.0], "lowest": 5.0, "step": 100})
    for step, loss in ((110, 4.0), (120, 6.0), (130, 1.0)):
        heat.add_loss(number(loss), step)
        moves.append(heat.temper(number(asked)).item())
    assert (moves[0] > 1) == (moves[2] > 1) == (asked > 1)
    assert moves[1] == min(asked, 1.0)


@pytest.mark.parametrize(("gain", "least"), [(2.0, 2.0), (0.5, 1.0), (-3.0, 1.0)])
def test_a_gain_is_taken_for_a_tenth_of_the_largest_at_least(gain, least):
    heat = heat_of([0.3 * least * 1.21] * 5, gain)
    heat.load({**heat.state(), "most": 10.0})
    assert heat.temper(number(1.2)).item() == pytest.approx(1 / 1.1)


@pytest.mark.parametrize("due", [1, 2, 4, 8])
@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.05, 1.3])
def test_one_move_for_several_probes_is_the_product_of_theirs(ratio, due):
    """The heat goes with the level, so each of them would have met what the one before left."""
    heats = [ratio * 0.3] * 5
    moved, one_by_one = 1.0, heat_of(heats, 1.0, 0.3)
    for _ in range(due):
        move = one_by_one.temper(number(1.2))
        one_by_one.rescale(move)
        moved *= move.item()
    at_once = heat_of(heats, 1.0, 0.3).temper(number(1.2), due).item()
    assert at_once == pytest.approx(min(max(moved, 1 / 1.5), 1.5), rel=1e-9)


@given(
    heats=st.lists(st.floats(-2, 2) | st.sampled_from((0.0, NAN, INF, -INF)), max_size=12),
    gain=st.floats(-2, 2),
    asked=st.floats(0.1, 4),
    limit=st.floats(1e-3, 10),
)
def test_no_move_is_wild(heats, gain, asked, limit):
    """Up by a half at most, and by a third down for the heat; the more heat, the less."""
    move = heat_of(heats, gain, limit).temper(number(asked)).item()
    assert min(asked, 1 / 1.5) * (1 - 1e-12) <= move <= max(asked, 1.5) * (1 + 1e-12)
    hotter = [each + abs(each) + 0.1 for each in heats]
    assert heat_of(hotter, gain, limit).temper(number(asked)).item() <= move * (1 + 1e-12)


def test_the_heat_goes_with_the_level():
    heat = heat_of([0.4, -0.4, 0.0, NAN, 0.2])
    heat.rescale(number(0.5))
    assert str(heat.state()["heats"]) == str([0.2, -0.4, 0.0, NAN, 0.1])


def level_of(limit=0.3, total_steps=None, limits=(1e-12, 1e4)):
    return Level(Optimizers(sgd(mlp())), "linear", total_steps, limits, limit)


@pytest.mark.parametrize(("step", "power"), [(0, 1.0), (50, 0.5), (100, 0.0)])
def test_a_move_shrinks_with_annealing(step, power):
    level = level_of(total_steps=100)
    level.heat.load(heat_of([3.0] * 5).state())
    moved = level.follow(number(1.2), step)
    assert moved.item() == level.value.item() == pytest.approx(1.5**-power)
    assert level.heat.state()["heats"] == pytest.approx([3.0 * 1.5**-power] * 5)


def test_the_limits_hold_the_level_and_the_heat_knows():
    level = level_of(limits=(0.09, 0.11))
    level.heat.load(heat_of([3.0] * 5).state())
    assert level.follow(number(1.2), 1).item() == pytest.approx(0.9)
    assert level.heat.state()["heats"] == pytest.approx([2.7] * 5)


@pytest.mark.parametrize(("retaken", "left"), [(0.0, 0.5), (0.1, 0.5), (0.7, 0.7), (0.9, 0.9)])
@pytest.mark.parametrize("with_ceiling", [False, True])
def test_a_level_that_was_lost_comes_back_slowly(retaken, left, with_ceiling):
    level = level_of(INF)
    level.start_at(3.0)
    level.fall(retaken, with_ceiling)
    assert level.value.item() == pytest.approx(3 * (min(left, 0.8) if with_ceiling else left))
    levels = [(level.follow(number(factor), 1), level.value.item())[1] for factor in (4.0, 0.5, 1.5, 2.0)]
    free = [12 * left, 6 * left, 9 * left, 18 * left]
    held = [2.4 * 1.03, 1.2 * 1.03, 1.8 * 1.03, 2.4 * 1.03**4]  # from four fifths on, 3 % more each time
    assert levels == pytest.approx(held if with_ceiling else free)
    other = level_of(math.inf)
    other.load(json.loads(json.dumps(level.state())))
    assert other.follow(number(2.0), 1).item() == pytest.approx(1.03 if with_ceiling else 2.0)
    other.follow(number(0.1), 1)
    lower = other.value.item()
    other.fall(retaken, with_ceiling=True)
    other.follow(number(100.0), 1)
    assert other.value.item() == pytest.approx(0.8 * 1.03 * lower)


@pytest.mark.usefixtures("every_probe")
def test_a_loss_of_zero_asks_for_nothing():
    """On a batch that is learned to the last bit nothing is left to gain: the level does not climb for ever."""
    model, x = mlp(), torch.randn(8, 5)
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, calibration_steps=0)
    start = scheduler.level
    for _ in range(60):
        train_step(model, optimizer, lambda model: scheduler.loss(lambda: F.relu(model(x) - 1e3).mean()))
        scheduler.step()
    assert len(scheduler.history) >= 4
    assert scheduler.level == start


# Elsewhere, and later


class Elsewhere(torch.Tensor):
    """As on an accelerator: a value that is read back is an error."""

    def item(self):
        raise AssertionError

    tolist = __float__ = __bool__ = __int__ = item


class FarScalars(type(scalars_of(torch.device("meta")))):
    """Those of an accelerator, on the CPU."""

    def number(self, value):
        return super().number(value).as_subclass(Elsewhere)

    tensor = number


def far(monkeypatch, read_back=False):
    """A heat as on an accelerator."""
    monkeypatch.setattr("autolr_fast._level.heat.scalars_of", FarScalars)
    heat = Heat(0.3, CPU)
    if read_back:
        monkeypatch.setattr(Elsewhere, "item", torch.Tensor.item)
        monkeypatch.setattr(Elsewhere, "__bool__", torch.Tensor.__bool__)
    return heat


def test_nothing_is_read_back(monkeypatch):
    heat = far(monkeypatch)
    for step in range(1, 9):
        heat.add_loss(number(1 / step).as_subclass(Elsewhere), step)
        heat.add_heat(number(0.1 * step).as_subclass(Elsewhere))
        moved = heat.temper(number(1.2).as_subclass(Elsewhere))
        heat.rescale(moved)
    assert type(moved) is Elsewhere
    on_meta = Heat(0.3, torch.device("meta"))
    on_meta.add_loss(torch.empty((), device="meta"), 1)
    on_meta.add_heat(torch.empty((), device="meta"))
    assert on_meta.temper(torch.empty((), dtype=torch.float64, device="meta")).shape == ()


NUMBERS = st.one_of(st.sampled_from([0.0, -1.0, NAN, INF, -INF]), st.floats(-3, 3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seen=st.lists(st.tuples(NUMBERS, NUMBERS, st.floats(0.1, 4), st.sampled_from([1, 2, 8])), max_size=12),
)
def test_a_cpu_and_an_accelerator_move_alike(seen, monkeypatch):
    near = Heat(0.3, CPU)
    with monkeypatch.context() as patch:
        other = far(patch, read_back=True)
        for step, (loss, each, asked, due) in enumerate(seen, 1):
            moves = []
            for heat in (near, other):
                heat.add_loss(number(loss), 3 * step)
                heat.add_heat(number(each))
                moves.append(heat.temper(number(asked), due).item())
                heat.rescale(number(moves[0]))
            assert moves[1] == pytest.approx(moves[0], rel=1e-12)
        states = [heat.state() for heat in (near, other)]
    for name, value in states[0].items():
        assert states[1][name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 11])
def test_it_goes_on_from_its_state(cut):
    draw = random.Random(1)
    seen = [(draw.random() / step, draw.gauss(0.02, 0.05)) for step in range(1, 16)] + [(NAN, INF), (0.02, 0.3)]

    def run(heat, start, stop):
        moves = []
        for step, (loss, each) in enumerate(seen[start:stop], start + 1):
            heat.add_loss(number(loss), 7 * step)
            heat.add_heat(number(each))
            moves.append(heat.temper(number(1.2)).item())
            heat.rescale(number(moves[-1]))
        return moves

    whole, resumed = Heat(0.3, CPU), Heat(0.3, CPU)
    run(whole, 0, cut)
    resumed.load(json.loads(json.dumps(whole.state())))
    assert run(whole, cut, len(seen)) == run(resumed, cut, len(seen))
    assert str(whole.state()) == str(resumed.state())


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        (0, ValueError),
        (-0.3, ValueError),
        (NAN, ValueError),
        ("some", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_what_cannot_be_a_limit_is_refused(limit, error):
    model = mlp()
    with pytest.raises(error, match=f"max_heat={limit!r}: (expected|give) a positive"):
        AutoLR(sgd(model), model, max_heat=limit)


# In a training


def spied(scheduler, monkeypatch):
    """The heats that a scheduler finds."""
    heats, add = [], scheduler._level.heat.add_heat
    monkeypatch.setattr(scheduler._level.heat, "add_heat", lambda heat: (heats.append(heat.item()), add(heat))[1])
    return heats


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("rule", [None, Rule(), Rule(window_steps=3)])
@pytest.mark.parametrize("evaluator", NAMED)
def test_the_heat_is_what_averaging_wins_on_deep_copies(evaluator, rule, monkeypatch):
    """Parameters from where the last step began, and from ten steps before; the batch of the last step."""
    every, span = (4, 4) if rule else (12, 10)
    model, _ = problem("mlp")
    optimizer = sgd(model, lr=0.05, momentum=0.9)
    scheduler = AutoLR(
        optimizer, model, rule=rule, calibration_steps=2, probe_every_steps=every, evaluator=evaluator
    )
    heats = spied(scheduler, monkeypatch)
    history, expected = [], []
    for step in range(1, 3 * every + 1):
        x, y = torch.randn(12, 5), torch.randint(3, (12,))
        history.append(parameters_of(model))
        optimizer.zero_grad()
        scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        before = everything(model, optimizer)
        scheduler.step()
        if step > 2:
            assert_same(before, everything(model, optimizer))
        if step % every == 0 and step > span:
            newer, older = history[-1], history[-1 - span]
            mixed = {name: between(older[name], newer[name], MEAN_AT) for name in newer}

            def loss_of(model, x=x, y=y):
                return F.cross_entropy(model(x), y)

            at_newer, at_mean = (losses_of_copies(model, prev, [0.0], loss_of)[0] for prev in (newer, mixed))
            expected.append(at_newer - at_mean)
            assert (probe := scheduler.last_probe).step == step
            assert probe.evaluator == evaluator
            if rule is None:
                assert (probe.window, probe.factors, probe.rounds) == (span, (2 / 3, 1.0), 1)
                assert probe.losses.tolist() == pytest.approx([at_mean, at_newer], rel=1e-5)
                assert probe.weights.tolist() == [at_mean < at_newer, at_mean > at_newer]
    assert len(heats) == len(expected) >= 2
    assert heats == pytest.approx(expected, rel=1e-3, abs=1e-5 if evaluator in ("stacked", "graphed") else 1e-7)


def test_no_limit_asks_for_no_averages():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.05)
    options = {"calibration_steps": 0, "probe_every_steps": 3, "evaluator": "inplace"}
    with pytest.raises(
        ValueError, match="max_heat=inf leaves nothing to move the level by: give a rule, or a finite"
    ):
        AutoLR(optimizer, model, max_heat=INF, **options)
    scheduler = AutoLR(optimizer, model, max_heat=INF, rule=Rule(), **options)
    kept = []
    for step in range(1, 13):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
        kept.append(len(scheduler.state_dict()["snapshots"]["windows"]))
        assert step % 3 or scheduler.last_probe.step == step
    assert kept == [0] * 12
    assert all(map(math.isnan, scheduler.state_dict()["level"]["heat"]["heats"]))


@pytest.mark.parametrize(("every", "opens"), [(20, [9, 19]), (10, [9]), (3, [0, 2]), (1, [])])
def test_between_probes_there_is_one_copy_from_where_averages_begin(every, opens):
    """One copy of the parameters; another as the last step begins, which the probe drops."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.01)
    scheduler = AutoLR(optimizer, model, calibration_steps=0, probe_every_steps=every, evaluator="inplace")
    span, kept, most = 1 + min(10, every), set(), []
    for step in range(1, 2 * every + 20):
        train_step(model, optimizer, loss_of)
        most.append(len(scheduler._snapshots._kept))
        scheduler.step(lambda: loss_of(model))
        starts = [start for start, *_ in scheduler.state_dict()["snapshots"]["windows"]]
        due = [m for m in range(step + 1, step + span + 1) if m % every == 0]
        assert starts == sorted({m - back for m in due for back in (1, span) if 0 <= m - back < step})
        kept |= {start % every for start in starts} if step >= 2 * every else set()
    assert max(most) <= 3 if every == 1 else 2
    assert max(most) >= 2
