"""The search along a line, of functions of the ratio: no models, no optimizers."""

import math
import random

import pytest
import torch

from autolr_fast import FACTORS_2, FACTORS_3, FACTORS_7
from autolr_fast._calibration.search import search, search_again
from autolr_fast._evaluators import Look


def look_at(loss_of, precision=1e-12):
    """A look at a function of the ratio, and the list of the candidates that it is asked about."""
    asked = []

    def look(ratios):
        asked.append(ratios)
        losses = torch.tensor([loss_of(ratio) for ratio in ratios], dtype=torch.float64)
        return Look(ratios, losses, losses, precision)

    return look, asked


def found_of(loss_of, precision=1e-12, **options):
    look, asked = look_at(loss_of, precision)
    unit = options.pop("unit", 10.0)  # the ratio at which the step is as long as the parameters
    return search(look, **{"at_once": 2, "step": 3 / unit, "begin": 3.0, **options}), asked


@pytest.mark.parametrize("at_once", [2, 3, 7])
@pytest.mark.parametrize("unit", [1e-6, 0.3, 1.0, 40.0, 1e5])
@pytest.mark.parametrize("length", [1e-4, 3e-3, 0.02, 0.12])
def test_search_finds_where_the_loss_is_lowest(length, unit, at_once):
    """The minimum of a parabola is met within a fifth, wherever it is and however long the step was."""
    best = length * unit
    found, asked = found_of(lambda ratio: (ratio / best - 1) ** 2, unit=unit, at_once=at_once)
    assert found.ratio == found.taken == pytest.approx(best, rel=0.2)
    assert found.cost == pytest.approx(0, abs=0.04)
    assert not found.why_not
    assert len(asked) == found.rounds <= 8
    assert sum(map(len, asked)) <= 15
    assert len(found.factors) == len(found.losses) == len({ratio for some in asked for ratio in some})


def test_what_is_looked_at_does_not_depend_on_the_step_that_was_taken():
    scans = []
    for unit in (1e-4, 1.0, 1e5):
        _, asked = found_of(lambda ratio, unit=unit: (ratio / unit - 0.05) ** 2, unit=unit)
        scans.append([ratio / unit for some in asked for ratio in some])
    assert scans[0] == pytest.approx(scans[1])
    assert scans[0] == pytest.approx(scans[2])
    assert len(scans[0]) == 9
    assert sorted(scans[0])[1] < 2e-7
    assert max(scans[0]) == 1 / 8


@pytest.mark.parametrize("power", [-5, 0, 3, 9])
def test_of_parameters_without_a_length_a_minimum_is_found_anywhere(power):
    """Also beyond eight decades further up."""
    best = 10.0 * 4.0**power
    found, _ = found_of(lambda ratio: (ratio / best - 1) ** 2, step=0.1, begin=0.0)
    assert found.ratio == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("length", [0.3, 1.0, 7.0, 1e4])
def test_no_step_is_longer_than_an_eighth_of_the_parameters(length):
    """A longer one forgets them: the losses of games, of policies and of adapters ask for that."""
    found, _ = found_of(lambda ratio: (ratio / (10 * length) - 1) ** 2)
    assert found.ratio == found.taken == 10 / 8
    assert found.cost < 1
    hill, _ = found_of(lambda ratio: (ratio / (10 * length) - 1) ** 2 + 3 * (1e-9 < ratio < 5))
    assert "no scale" in hill.why_not
    if length > 1:  # what the far one is worth up to there is less than the near one
        near, _ = found_of(lambda ratio: min((ratio / (10 * length) - 1) ** 2 + 1, (ratio / 0.1 - 1) ** 2 + 1.9))
        assert near.ratio == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("ruined", [math.inf, math.nan])
def test_where_no_loss_is_finite_is_not_gone_to(ruined):
    found, _ = found_of(lambda ratio: (ratio / 1e-3 - 1) ** 2 if ratio < 1e-1 else ruined)
    assert found.ratio == pytest.approx(1e-3, rel=1e-6)
    beside, _ = found_of(lambda ratio: (ratio / 100 - 1) ** 2 if ratio < 90 else ruined, unit=2000)
    assert 60 < beside.ratio < 90
    middle, _ = found_of(lambda ratio: ruined if 1e-2 < ratio < 1e-1 else (ratio / 1e-3 - 1) ** 2)
    assert middle.ratio == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("at_once", [2, 3])
@pytest.mark.parametrize("began", [2.0, -0.1])
@pytest.mark.parametrize("slope", [1.0, 1e-3, 1e3])
def test_a_loss_that_falls_for_ever_has_no_minimum(slope, began, at_once):
    """As that of a policy gradient: the step stays as it is."""
    found, asked = found_of(lambda ratio: began - slope * ratio, at_once=at_once)
    assert found.is_endless
    assert "has no minimum" in found.why_not
    assert (found.ratio, found.taken) == (1.0, 1.0)
    assert sum(map(len, asked)) < 30
    minus_infinite, _ = found_of(lambda ratio: -math.inf if ratio > 1 else -ratio)
    assert minus_infinite.is_endless


def test_a_loss_that_levels_off_counts_as_one_that_rises():
    """A bounded loss does, as that of adapters: the nearest ratio is taken at which nearly all is won."""
    knee, _ = found_of(lambda ratio: 1 - math.tanh(ratio / 0.01))
    assert 0.01 < knee.ratio < 0.08
    shallow, _ = found_of(lambda ratio: 2 - math.tanh(ratio / 0.01) - 0.05 * math.tanh(ratio / 50))
    assert 0.01 < shallow.ratio < 0.08


@pytest.mark.parametrize("depth", [0.3, 0.9])
def test_the_nearest_deep_minimum_is_taken(depth):
    """Here at 0.003, and at 1; the nearer one has at least half the depth of the other, or is passed by."""

    def loss_of(ratio):
        near = depth * math.exp(-(math.log(max(ratio, 1e-99) / 3e-3) ** 2))
        far = math.exp(-(math.log(max(ratio, 1e-99)) ** 2))
        return 3 - near - far

    found, _ = found_of(loss_of)
    assert found.ratio == pytest.approx(3e-3 if depth > 0.5 else 1, rel=0.3)


@pytest.mark.parametrize("bend", [0.3, 0.8, 1.0, 1.2, 2.0, 3.0])
@pytest.mark.parametrize("kinks", range(8))
def test_whatever_the_loss_no_ratio_is_below_zero_or_beyond_the_longest(bend, kinks):
    """A loss that falls ever faster has a parabola with no lowest place."""

    def loss_of(ratio):
        return 2 - min(ratio, 3 + kinks) ** bend + 0.05 * math.sin(kinks * ratio)

    found, asked = found_of(loss_of)
    assert min(ratio for some in asked for ratio in some) == 0
    if not found.why_not:
        assert 0 < found.ratio <= 10 / 8
        assert found.cost < loss_of(0)


def test_a_far_shallow_minimum_is_not_preferred_from_beside_it():
    """From a step far too long, the loss of adapters has a minimum near it, above where the step began."""
    found, _ = found_of(lambda ratio: (2 + (ratio - 1) ** 2) if ratio > 0.5 else (ratio / 1e-3 - 1) ** 2)
    assert found.ratio == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(("ended", "taken"), [(2.0, 0.0), (1.0, 1.0), (math.nan, 0.0), (math.inf, 0.0)])
def test_a_step_that_does_not_lower_the_loss_at_any_scale_is_undone_if_it_raised_it(ended, taken):
    found, _ = found_of(lambda ratio: ended if ratio == 1.0 else 1 + min(ratio, 1.0) * 1e-3)
    assert "no scale of the step" in found.why_not
    assert found.taken == taken
    assert found.cost == 1.0
    assert not found.is_endless


def test_a_fall_within_noise_is_none():
    def loss_of(ratio):
        return 2 + random.Random(str(ratio)).uniform(-1e-3, 1e-3) if ratio < 0.1 else 2 + ratio

    found, _ = found_of(loss_of)
    assert found.why_not
    assert found.taken in (0.0, 1.0)


@pytest.mark.parametrize("began", [math.nan, math.inf])
def test_a_loss_that_was_not_finite_before_the_step_says_nothing(began):
    found, asked = found_of(lambda ratio: 1.0 if ratio else began)
    assert "before the step" in found.why_not
    assert found.taken == 1.0
    assert sum(map(len, asked)) == 3


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 3e-3])
@pytest.mark.parametrize("best", [0.7, 1e-1, 1e-2])
def test_search_is_not_held_by_the_noise_of_steps_too_short_to_be_seen(best, noise):
    """In a forward of 16 bits, most weights do not change at such a step, and some by too much."""
    found = []
    for seed in range(40):
        loss_of = lambda ratio, seed=seed: (  # noqa: E731
            (2 + (ratio / best - 1) ** 2) * random.Random(f"{seed} {ratio}").uniform(1 - noise, 1)
        )
        found.append(found_of(loss_of)[0].ratio / best)
    assert min(found) > 0.7
    assert max(found) < 1.5


@pytest.mark.parametrize("best", [0.3, 1e-3])
def test_search_of_losses_of_eight_bits_ends_in_their_flat_bottom(best):
    """Many are equal, and below, where steps are too short, one is off by a bit here and there."""
    for seed in range(40):

        def loss_of(ratio, seed=seed):
            off = random.Random(f"{seed} {ratio}").uniform(-1, 1) if ratio < best / 1000 else 0
            return round(128 * (2 + (ratio / best - 1) ** 2) + off) / 128

        found, _ = found_of(loss_of, precision=2**-9)
        assert found.ratio == pytest.approx(best, rel=0.25)
        assert not found.why_not


@pytest.mark.parametrize("step", [math.inf, math.nan, 0.0])
def test_a_step_that_has_no_length_is_told(step):
    still, asked = found_of(lambda ratio: 2.0, step=step)
    assert "all candidates have the same loss" in still.why_not
    assert sum(map(len, asked)) <= 4
    ruined, _ = found_of(lambda ratio: math.nan if ratio else 2.0, step=step)
    assert "no scale of the step" in ruined.why_not
    assert ruined.taken == 0.0


@pytest.mark.parametrize("highest", [0.8, 0.03, 1e-3])
def test_a_step_is_not_taken_beyond_the_limit(highest):
    found, _ = found_of(lambda ratio: (ratio - 1) ** 2, highest=highest)
    assert found.ratio == pytest.approx(1)
    assert found.taken == highest
    wall, _ = found_of(lambda ratio: (ratio - 1) ** 2 + 2 * (0.03 <= ratio < 0.9), highest=highest)
    assert wall.taken < 0.03  # the best of those that were looked at
    assert 0 < wall.cost < 1


@pytest.mark.parametrize(
    ("losses", "precision", "flat"),
    [
        ([1.0, 1.0, 1.0], 1e-7, True),
        ([1.0, 1.0 + 1e-7, 1.0], 1e-7, True),
        ([1.0, 1.0 + 1e-6, 1.0], 1e-7, False),
        ([1.0, 1.01, 1.0], 2**-7, True),
        ([1.0, math.inf, 1.0], 1e-7, False),
        ([0.0, 0.0, 0.0], 1e-7, True),
    ],
)
def test_losses_too_close_to_tell(losses, precision, flat):
    def look(ratios):
        seen = torch.tensor(losses[: len(ratios)], dtype=torch.float64)
        return Look(ratios, seen, seen, precision)

    assert ("same loss" in search(look, 3, 1.0, 1.0).why_not) is flat


def again(loss_at, loss, before):
    """Search again along steps; return what was found, and at how many factors was looked."""
    look, asked = look_at(loss_at, precision=1e-7)
    return search_again(look, loss, before), sum(map(len, asked))


@pytest.mark.parametrize("best", [0.6, 0.1, 3e-3])
def test_steps_after_which_the_loss_is_four_times_as_high_had_better_been_shorter(best):
    found, looked = again(lambda ratio: 1 + 100 * (ratio / best - 1) ** 2, 1 + 100 * (1 / best - 1) ** 2, 1.5)
    if best == 0.6:
        assert found is None  # the loss was higher where they began
        return
    assert found.taken == found.ratio == pytest.approx(best)
    assert found.cost < 1.1
    assert looked == 10


def test_a_negative_loss_blows_up_by_its_size():
    assert again(lambda ratio: 3.1 * ratio - 1, 2.1, -1.0)[0].taken == 0
    assert again(lambda ratio: 2.9 * ratio - 1, 1.9, -1.0) == (None, 0)


@pytest.mark.parametrize(("began", "least"), [(4.0, 2.0), (2.0, 1.0), (-1.0, 0.5), (0.0, 0.0)])
def test_steps_that_raised_the_loss_of_their_batch_by_half_are_to_blame(began, least):
    """Several may have done it together; of those that did not, nothing is looked at but how far they raised it."""
    blown = began + 1.1 * least + 9
    for rise in (0.9 * least, 1.1 * least, least + 1):
        found, looked = again(lambda ratio, rise=rise: began + rise * ratio, blown, -0.1)
        assert (found is None, looked == 2) == (rise <= least,) * 2
        assert found is None or found.taken == 0


@pytest.mark.parametrize(("cost", "rise", "is_taken"), [(5.9, 9, False), (6.1, 1.9, False), (6.1, 2.1, True)])
def test_a_rise_that_is_too_much_may_be_given(cost, rise, is_taken):
    """It holds for the loss after the steps, and for what they did to that of their batch."""
    look, _ = look_at(lambda ratio: 4 + rise * ratio)
    assert (search_again(look, cost, 4.0, most=2.0) is not None) == is_taken


def test_where_no_shorter_steps_help_they_are_undone():
    """What is nearest to where they ended may be better the longer it is."""
    found, _ = again(lambda ratio: 1 + 100 * min(ratio, 0.1) - 0.5 * ratio, 10.5, 1.0)
    assert found.taken == 0
    assert found.cost == 1


@pytest.mark.parametrize(
    ("loss_at", "loss", "before", "looked"),
    [
        (lambda ratio: 3.9, 3.9, 1.0, 0),  # not as much
        (lambda ratio: 4 + 2 * ratio, 6.0, 1.0, 2),  # another batch had a lower loss
        (lambda ratio: 1 + 99 * (ratio > 1), 100.0, 1.0, 2),  # only further steps would have done harm
        (lambda ratio: 5.0, 5.0, math.inf, 0),  # nothing known from before
        (lambda ratio: math.nan, math.nan, 1.0, 2),  # nor is it finite where they began
    ],
)
def test_steps_that_did_no_harm_stay(loss_at, loss, before, looked):
    assert again(loss_at, loss, before) == (None, looked)


@pytest.mark.parametrize("factors", [FACTORS_2, FACTORS_3, FACTORS_7])
def test_a_search_looks_at_as_many_candidates_at_once_as_a_probe(factors):
    """Evaluators allocate for as many."""
    _, asked = found_of(lambda ratio: (ratio / 0.1 - 1) ** 2, at_once=len(factors))
    assert max(map(len, asked)) == len(factors)
    assert len(asked[0]) == len(factors)
