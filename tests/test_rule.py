import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolr_fast import FACTORS_3, FACTORS_5, FACTORS_7, Rule
from autolr_fast.reference import next_lr
from autolr_fast.rule import NORMALIZATIONS

finite_losses = st.lists(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6)), min_size=2, max_size=9, unique=True
)


def weigh_named(losses, factors, normalize="minmax", score="exp"):
    return Rule(factors, score, normalize).weigh(torch.tensor(losses, dtype=torch.float64))


def some_factors(n):
    return [2.0 ** (k - n / 2 + 0.25) for k in range(n)]


def test_source_factors():
    assert FACTORS_3 == (2, 1, 0.5)
    assert FACTORS_5 == (4, 2, 1, 0.5, 0.125)
    assert FACTORS_7 == (8, 4, 2, 1, 0.5, 0.25, 0.125)


@given(finite_losses)
def test_minmax_exp_is_the_source(losses):
    factors = some_factors(len(losses))
    _, factor = weigh_named(losses, factors)
    assert factor.item() == pytest.approx(next_lr(losses, 1.0, factors), rel=1e-9)


@given(finite_losses, st.sampled_from(sorted(NORMALIZATIONS)))
def test_factor_is_a_mean_and_weights_are_shares(losses, normalize):
    factors = some_factors(len(losses))
    weights, factor = weigh_named(losses, factors, normalize)
    assert min(factors) * (1 - 1e-12) <= factor.item() <= max(factors) * (1 + 1e-12)
    assert weights.sum().item() == pytest.approx(1)
    by_loss = [weight for _, weight in sorted(zip(losses, weights.tolist(), strict=True))]
    assert by_loss == sorted(by_loss, reverse=True)


@given(finite_losses, st.randoms())
def test_order_of_candidates_does_not_matter(losses, random):
    factors = some_factors(len(losses))
    pairs = list(zip(losses, factors, strict=True))
    _, factor = weigh_named(losses, factors)
    random.shuffle(pairs)
    _, shuffled = weigh_named([p[0] for p in pairs], [p[1] for p in pairs])
    assert shuffled.item() == pytest.approx(factor.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("normalize", "by_hand"),
    [
        ("zscore", lambda v, vs: (v - statistics.mean(vs)) / statistics.pstdev(vs)),
        ("sum", lambda v, vs: v / sum(vs)),
        ("none", lambda v, vs: v),
    ],
)
def test_other_normalizations_by_hand(normalize, by_hand):
    losses = [0.7, 1.1, 2.0]
    scores = [math.exp(-by_hand(v, losses)) for v in losses]
    weights, factor = weigh_named(losses, FACTORS_3, normalize)
    assert weights.tolist() == pytest.approx([s / sum(scores) for s in scores])
    expected = math.prod(f ** (s / sum(scores)) for f, s in zip(FACTORS_3, scores, strict=True))
    assert factor.item() == pytest.approx(expected)


@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_scores_zero(normalize, bad):
    weights, factor = weigh_named([bad, 1.0, 2.0], FACTORS_3, normalize)
    assert weights[0] == 0
    assert weights[1] > weights[2] > 0
    assert 0.5 < factor < 1


@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
def test_only_one_finite_loss_decides(normalize):
    _, factor = weigh_named([math.nan, math.inf, 3.0], FACTORS_3, normalize)
    assert factor.item() == pytest.approx(0.5)


@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
def test_all_non_finite_says_nothing_unless_the_loss_before_was(normalize):
    losses = torch.full((5,), math.nan, dtype=torch.float64)
    rule = Rule(FACTORS_5, normalize=normalize)
    for before, expected in ((None, 1.0), (math.nan, 1.0), (math.inf, 1.0), (2.0, 0.125)):
        weights, factor = rule.weigh(losses, before if before is None else torch.tensor(before))
        assert factor == expected
        assert weights.tolist() == [0] * 5
    _, factor = rule.weigh(torch.tensor([1.0, *[math.nan] * 4], dtype=torch.float64), torch.tensor(2.0))
    assert factor == 4  # one loss is enough


@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
def test_equal_losses_say_nothing(normalize):
    _, factor = weigh_named([1.5] * 5, FACTORS_5, normalize)  # the plain mean of FACTORS_5 would be 0.87
    assert factor == 1


def test_huge_losses_do_not_underflow():
    weights, factor = weigh_named([5000.0, 5001.0, 5002.0], FACTORS_3, "none")
    assert weights.tolist() == pytest.approx([0.66524, 0.24473, 0.09003], abs=1e-5)
    assert factor > 1


def test_zero_score_everywhere_leaves_the_rate():
    _, factor = weigh_named([1.0, 2.0, 3.0], FACTORS_3, "none", torch.zeros_like)
    assert factor == 1


def test_callables():
    def best_only(x):
        return (x == x.amin()).to(x)

    _, factor = weigh_named([3.0, 2.0, 1.0], FACTORS_3, lambda losses: losses**2, best_only)
    assert factor.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ((), "empty"),
        ((2, 0), "0.0 is not a positive"),
        ((2, -1), "-1.0 is not a positive"),
        ((2, math.inf), "inf is not a positive"),
        ((2, math.nan), "nan is not a positive"),
        ((2, 1, 2.0), "2.0 appears more than once"),
        (3, "expected numbers"),
        (("a",), "expected numbers"),
        ("21", "expected numbers"),
        ((4, 2), "one way only"),
        ((1, 0.5), "one way only"),
    ],
)
def test_bad_factors(factors, says):
    with pytest.raises((TypeError, ValueError), match=f"factors=.*{says}"):
        Rule(factors)


@pytest.mark.parametrize(
    ("argument", "value", "error", "says"),
    [
        ("score", "log", ValueError, "score='log' is not known: use one of 'exp'"),
        ("normalize", "mean", ValueError, "'minmax', 'zscore', 'sum', 'none'"),
        ("score", 3, TypeError, "score=3"),
        ("score", lambda x: x.sum(), ValueError, r"same shape, \[3\]"),
        ("score", lambda x: -x, ValueError, "none of them negative"),
        ("normalize", lambda x: x / 0, ValueError, "finite"),
        ("normalize", lambda x: None, ValueError, "returned None"),
        ("direction", "back", ValueError, "direction='back' is not known: use 'step' or 'gradient'"),
        ("window_steps", 0, ValueError, "window_steps=0"),
        ("window_steps", (), ValueError, "window_steps=.* is empty"),
        ("window_steps", (1, 2.0), TypeError, "window_steps=2.0"),
    ],
)
def test_bad_rules(argument, value, error, says):
    with pytest.raises(error, match=says):
        Rule(FACTORS_3, **{argument: value})


def test_a_score_is_tried_on_what_it_will_see():
    Rule(FACTORS_3, lambda x: 1 - x)
    with pytest.raises(ValueError, match="score=.*finite"):
        Rule(FACTORS_3, lambda x: 1 / x)


def test_a_negative_score_counts_as_none():
    weights, factor = weigh_named([1.0, 2.0, 4.0], FACTORS_3, "none", lambda x: (2 - x).where(x.amax() > 3, 1.0))
    assert weights.tolist() == [1, 0, 0]
    assert factor.item() == pytest.approx(2)
