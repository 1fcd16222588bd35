"""The first rate: the search along the first step for the scale where the loss is lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .._evaluators.prober import Look

__all__ = ["Found", "LookAt", "search", "search_again"]

LookAt = Callable[[Sequence[float]], Look]
"""From ratios to the step that was taken to what these candidates say."""

_MAX_ROUNDS = 80  # about 10 are needed for six decades
_WIDEST = 8  # power of the factors
_NOISE = 0.02  # of a loss: what rounding in a forward of 16 bits makes, at most
_SHORTEST = 1e-3  # of steps that are taken again: next to where they began
_BLOWN_UP = 4  # times as high a loss


class Found(NamedTuple):
    """Where a search ended.

    Attributes:
        ratio: to the step that was taken.
        seen: the last look.
        rounds: looks in all.
        is_flat: whether all losses were the same.
        cost: the lowest that was seen, infinite if none was finite.
        is_uphill: whether that is not below where the step began.
    """

    ratio: float
    seen: Look
    rounds: int
    is_flat: bool
    cost: float
    is_uphill: bool = False

    @property
    def why_not(self) -> str:
        """Why nothing was found; empty if something was."""
        if self.is_flat:
            return (
                "all candidates have the same loss. Either the step is below the precision of the loss: start from "
                "a higher learning rate. Or the closure returns a loss that was computed before: call the model "
                "inside, as in scheduler.loss(lambda: loss_fn(model(x), y))"
            )
        if self.cost == math.inf:
            return "the loss was not finite at any scale of the step. Check the first batch and the loss"
        return "no scale of the step lowers the loss of its batch" * self.is_uphill


def search(look: LookAt, factors: Sequence[float], lowest: float, highest: float) -> Found:
    """Go to the best candidate seen until none is better: a pattern search over the logarithm of the ratio.

    The candidates lie further apart each round while the best one is at the edge of what was seen, and closer and
    closer around it otherwise. Where between its neighbours the best ratio lies, a parabola through their losses
    tells, which is exact for a quadratic loss. The search ends only where the loss has risen further up: below,
    steps may be too short for the precision of the forward, and each loss as good as the next.

    Args:
        look: from ratios to what these candidates say.
        factors: the candidates of a round are ``ratio * factors ** power``.
        lowest: smallest ratio.
        highest: largest ratio.

    Example:
        >>> import torch
        >>> def look(ratios):  # the best ratio is 8000
        ...     losses = torch.tensor([(ratio / 8000 - 1) ** 2 for ratio in ratios])
        ...     return Look(ratios, losses, costs=losses, precision=1e-7)
        >>> found = search(look, (2.0, 0.5), 1e-6, 1e6)
        >>> round(found.ratio), found.rounds
        (8000, 7)
    """
    widest = max(factors)
    known: dict[float, float] = {}  # ratio -> its cost
    ratio = centre = 1.0  # where is looked, and where the best was
    power = leap = rounds = 1
    while True:
        seen = look(tuple(ratio * factor**power for factor in factors))
        costs = (cost if math.isfinite(cost) else math.inf for cost in seen.costs.tolist())
        known.update(zip(seen.factors, costs, strict=True))
        best = _best(known)
        is_flat = _are_equal(known.values(), seen.precision)
        if rounds == _MAX_ROUNDS:
            break
        if not is_flat and best != centre and lowest <= best <= highest:  # better: go on from there
            power = min(2 * power, _WIDEST) if best in (min(known), max(known)) else max(power // 2, 1)
            ratio = centre = best
        elif not is_flat and ratio == centre and power > 1:  # no better: look closer
            power //= 2
        elif widest > 1 and max(known) < highest and not _has_risen(known, best):  # it may be, further up
            ratio, power = max(known) * widest ** (3 * leap), leap
            leap = min(2 * leap, _WIDEST // 2)
        elif widest > 1 and is_flat and min(known) > lowest:  # or further down, if the loss has saturated
            ratio, power = min(known) / widest ** (3 * leap), leap
        else:
            break
        rounds += 1
    return Found(min(max(_vertex(known, best), lowest), highest), seen, rounds, is_flat, known[best])


def search_again(
    look: LookAt, factors: Sequence[float], cost: float, before: float, began: float | None = None
) -> Found | None:
    """Find how long the last steps had better been, if the loss blew up in them.

    A rate that suits the first step may be far too high for the fifth, and then each step multiplies the loss; no
    lower rate brings back a network that is lost.

    Args:
        look: from factors of the steps to what these candidates say.
        factors: those of the search.
        cost: about where the steps ended: what tells whether to look at all.
        before: the lowest of earlier steps, with other batches.
        began: where the steps began, with this batch, if it is known.

    Returns:
        ``None`` if the loss did not blow up, with this batch, from where the steps began to where they ended, or is
        not finite where they began.
    """
    if not _has_blown_up(cost, before):
        return None
    if began is None:
        ended, began = look((1.0, _SHORTEST)).costs.tolist()
    else:
        (ended,) = look((1.0,)).costs.tolist()
    if not (math.isfinite(began) and _has_blown_up(ended, began)):
        return None
    found = search(look, factors, _SHORTEST, 1.0)
    best = found if found.cost < began else found._replace(ratio=_SHORTEST, cost=began)
    return best._replace(rounds=found.rounds + 1)


def _has_blown_up(loss: float, before: float) -> bool:
    """Whether a loss is not finite, or four times as high as another (above it by three times its size)."""
    return not loss - before <= (_BLOWN_UP - 1) * abs(before)


def _best(known: Mapping[float, float]) -> float:
    """Return the ratio with the lowest loss; of equals, the least likely to be too low, or too high, to be seen."""
    return min(known, key=lambda ratio: (known[ratio], ratio if known[ratio] == math.inf else -ratio))


def _are_equal(losses: Iterable[float], precision: float) -> bool:
    """Whether losses are finite and differ by rounding at most: the candidates are too close to each other."""
    low, high = min(losses), max(losses)
    return math.isfinite(high) and high - low <= 2 * precision * max(abs(low), abs(high))


def _has_risen(known: Mapping[float, float], best: float) -> bool:
    """Whether a loss further up is above the lowest by more than noise."""
    rise = _NOISE * abs(known[best])
    return any(loss - known[best] > rise for ratio, loss in known.items() if ratio > best)


def _vertex(known: Mapping[float, float], best: float) -> float:
    """Return where a parabola through the lowest loss and its neighbours' is lowest."""
    below = max((other for other in known if other < best), default=best)
    above = min((other for other in known if other > best), default=best)
    if best in (below, above):
        return best
    down, up = best - below, above - best
    falls, rises = (known[below] - known[best]) / down, (known[above] - known[best]) / up
    shift = (falls * up - rises * down) / (2 * (falls + rises)) if falls + rises else 0.0
    return best + shift if math.isfinite(shift) else best
