"""The first rate: the search along the first step for the scale where the loss is lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LOWEST_AGAIN", "Found", "Look", "search", "search_again", "steady_state"]

_MAX_ROUNDS = 80  # about 10 are needed for six decades
_WIDEST = 8  # power of the factors
_NOISE = 0.02  # of a loss: what rounding in a forward of 16 bits makes, at most
LOWEST_AGAIN = 1 / 2
"""Of the level at which steps were taken, what is left at least for those after they were taken again."""
_SHORTEST = 1e-3  # of steps that are taken again: next to where they began
_BLOWN_UP = 4  # times as high a loss
_CAUTION = 1 / 3  # the level after the first step, at most, in units of the rate that suits that step


class Look(NamedTuple):
    """One evaluation of all candidates.

    Attributes:
        factors: N of the step that was taken.
        losses: [N] float64.
        precision: the relative rounding error of the losses.
    """

    factors: Sequence[float]
    losses: Tensor
    precision: float


class Found(NamedTuple):
    """Where a search ended.

    Attributes:
        ratio: to the step that was taken.
        seen: the last look.
        rounds: looks in all.
        unseen: whether all losses were the same, so that nothing was found.
        lowest: the lowest loss seen (negated, of what is maximized), infinite if none was finite.
    """

    ratio: float
    seen: Look
    rounds: int
    unseen: bool
    lowest: float


def search(
    look: Callable[[Sequence[float]], Look],
    factors: Sequence[float],
    lowest: float,
    highest: float,
    *,
    maximize: bool = False,
) -> Found:
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
        maximize: whether a higher loss is better.

    Example:
        >>> def look(ratios):  # the best ratio is 8000
        ...     losses = torch.tensor([(ratio / 8000 - 1) ** 2 for ratio in ratios])
        ...     return Look(ratios, losses, precision=1e-7)
        >>> found = search(look, (2.0, 0.5), 1e-6, 1e6)
        >>> round(found.ratio), found.rounds
        (8000, 7)
    """
    widest = max(factors)
    known: dict[float, float] = {}  # ratio -> its loss
    ratio = centre = 1.0  # where is looked, and where the best was
    power = leap = rounds = 1
    while True:
        seen = look(tuple(ratio * factor**power for factor in factors))
        losses = (-seen.losses if maximize else seen.losses).tolist()
        known.update(zip(seen.factors, (x if math.isfinite(x) else math.inf for x in losses), strict=True))
        best = _best(known)
        unseen = _are_equal(known.values(), seen.precision)
        if rounds == _MAX_ROUNDS:
            break
        if not unseen and best != centre and lowest <= best <= highest:  # better: go on from there
            power = min(2 * power, _WIDEST) if best in (min(known), max(known)) else max(power // 2, 1)
            ratio = centre = best
        elif not unseen and ratio == centre and power > 1:  # no better: look closer
            power //= 2
        elif widest > 1 and max(known) < highest and not _has_risen(known, best):  # it may be, further up
            ratio, power = max(known) * widest ** (3 * leap), leap
            leap = min(2 * leap, _WIDEST // 2)
        elif widest > 1 and unseen and min(known) > lowest:  # or further down, if the loss has saturated
            ratio, power = min(known) / widest ** (3 * leap), leap
        else:
            break
        rounds += 1
    return Found(min(max(_vertex(known, best), lowest), highest), seen, rounds, unseen, known[best])


def search_again(
    look: Callable[[Sequence[float]], Look],
    factors: Sequence[float],
    loss: float,
    before: float,
    *,
    maximize: bool = False,
) -> Found | None:
    """Find how long the last steps had better been, if the loss blew up in them.

    A rate that suits the first step may be far too high for the fifth, and then each step multiplies the loss; no
    lower rate brings back a network that is lost.

    Args:
        look: from factors of the steps to what these candidates say.
        factors: those of the search.
        loss: about where the steps ended (negated, of what is maximized): what tells whether to look at all.
        before: the lowest of earlier steps, with other batches.
        maximize: whether a higher loss is better.

    Returns:
        ``None`` if the loss did not blow up, with this batch, from where the steps began to where they ended, or is
        not finite where they began.
    """
    if not _has_blown_up(loss, before):
        return None
    ends = look((1.0, _SHORTEST)).losses
    ended, began = (-ends if maximize else ends).tolist()
    if not (math.isfinite(began) and _has_blown_up(ended, began)):
        return None
    found = search(look, factors, _SHORTEST, 1.0, maximize=maximize)
    best = found if found.lowest < began else found._replace(ratio=_SHORTEST, lowest=began)
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


def steady_state(optimizer: torch.optim.Optimizer, warm: bool) -> float:
    """Return how much smaller the level should be at first than the rate that suits the first step.

    What suits the first step is too much for the next ones: its loss is the easiest to lower. A start too high may
    lose the network; one too low is made good by the next probes. With SGD's momentum, whose buffer is empty at
    first, later steps are 1 / (1 - momentum) times longer besides, and steadier; Adam corrects the bias of its
    first steps.

    Args:
        optimizer: SGD has ``dampening``, and others with a momentum have not.
        warm: whether the buffers held something before that step, as they do in a training that goes on.
    """
    momenta = [group["momentum"] for group in optimizer.param_groups if "dampening" in group]
    return 1.0 if warm else min(_CAUTION, 1.0 - max(momenta, default=0.0))
