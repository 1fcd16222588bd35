"""The first rate: the search along the first step for the scale where the loss is lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Found", "Look", "is_unseen", "search", "steady_state"]

_MAX_ROUNDS = 80  # about 10 are needed for six decades
_WIDEST = 8  # power of the factors
_CAUTION = 1 / 3  # the level after the first step, at most, in units of the rate that suits that step


class Look(NamedTuple):
    """One evaluation of all candidates: N factors, losses [N], weights [N], and the 0-dim factor they give.

    ``precision`` is the relative rounding error of the losses.
    """

    factors: Sequence[float]
    losses: Tensor
    weights: Tensor
    factor: Tensor
    precision: float


class Found(NamedTuple):
    """Where a search ended: the ratio to the step that was taken, what was seen last, and after how many rounds."""

    ratio: float
    seen: Look
    rounds: int


def search(look: Callable[[float, int], Look], lowest: float, highest: float, *, maximize: bool = False) -> Found:
    """Go to the best candidate until none is better: a pattern search over the logarithm of the ratio.

    The candidates lie further apart each round while that goes on in one direction, and closer each round
    afterwards. Where between the last candidates the best ratio lies, a parabola through their losses tells, which
    is exact for a quadratic loss.

    Args:
        look: from a ratio and a power to what the candidates ``ratio * factors ** power`` say.
        lowest: smallest ratio.
        highest: largest ratio.
        maximize: whether a higher loss is better.

    Example:
        >>> def look(ratio, power):  # the best ratio is 8000
        ...     factors = (ratio * 2**power, ratio / 2**power)
        ...     losses = torch.tensor([(factor / 8000 - 1) ** 2 for factor in factors])
        ...     return Look(factors, losses, torch.ones(2), torch.tensor(1.0), 1e-7)
        >>> found = search(look, 1e-6, 1e6)
        >>> round(found.ratio), found.rounds
        (8000, 7)
    """
    ratio, best = 1.0, math.inf  # the loss at the ratio, infinite while it is not known
    power, rounds, direction, widening, upwards = 1, 0, 0.0, True, True
    while True:
        seen = look(ratio, power)
        rounds += 1
        losses = {
            factor: loss if math.isfinite(loss) else math.inf
            for factor, loss in zip(seen.factors, (-seen.losses if maximize else seen.losses).tolist(), strict=True)
        }
        blind = best == math.inf and is_unseen(seen)
        if blind:
            target, loss = max(losses) if upwards else min(losses), math.inf
        else:
            target = min(losses, key=lambda factor: (losses[factor], factor))
            loss = losses[target]
        wanted = min(max(target, lowest), highest)
        moved = math.log(wanted / ratio)
        if moved and (loss < best or best == math.inf):
            widening = widening and moved * direction >= 0
            ratio, best, direction = wanted, loss if wanted == target else math.inf, moved
        elif blind and upwards:  # up to the limit nothing was seen: it may be that the loss has saturated
            ratio, power, direction, widening, upwards = 1.0, 1, 0.0, True, False
        elif power > 1:
            widening = False
        else:
            return Found(min(max(_vertex(ratio, best, losses), lowest), highest), seen, rounds)
        if rounds == _MAX_ROUNDS:
            return Found(ratio, seen, rounds)
        power = min(2 * power, _WIDEST) if widening else max(power // 2, 1)


def _vertex(ratio: float, loss: float, around: Mapping[float, float]) -> float:
    """Return where a parabola through the losses at a ratio and at its neighbours is lowest.

    Args:
        ratio: whose loss is the lowest.
        loss: the one there.
        around: the losses at other ratios.
    """
    below = max((other for other in around if other < ratio), default=ratio)
    above = min((other for other in around if other > ratio), default=ratio)
    if ratio in (below, above) or not math.isfinite(loss + around[below] + around[above]):
        return ratio
    down, up = ratio - below, above - ratio
    falls, rises = (around[below] - loss) / down, (around[above] - loss) / up
    if falls < 0 or rises < 0 or falls + rises == 0:
        return ratio
    return ratio + (falls * up - rises * down) / (2 * (falls + rises))


def is_unseen(seen: Look) -> bool:
    """Whether all losses are finite and differ by rounding at most: the candidates are too close to each other."""
    losses = seen.losses
    spread = losses.amax() - losses.amin()
    return bool(losses.isfinite().all() & (spread <= 2 * seen.precision * losses.abs().amax()))


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
