"""The first rate: the search along the first step, repeated until the factor settles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Look", "search", "steady_state"]

_MAX_ROUNDS = 80  # FACTORS_3 with exp over minmax moves by at most x 1.23 a round: seven decades
_SETTLED = 0.1  # a round that moves the logarithm of the rate by less ends the search


class Look(NamedTuple):
    """One evaluation of all candidates: N factors, losses [N], weights [N], and the 0-dim factor they give."""

    factors: Sequence[float]
    losses: Tensor
    weights: Tensor
    factor: Tensor


def search(look: Callable[[float], Look], lowest: float, highest: float) -> tuple[float, Look, int]:
    """Follow the factor until it settles.

    Args:
        look: from a ratio to what the candidates ``ratio * factors`` say.
        lowest: smallest ratio.
        highest: largest ratio.

    Returns:
        ``(ratio, last look, rounds)``: the ratio to the step that was taken at which the factor is near 1.

    Example:
        >>> def look(ratio):  # the best ratio is 8; half of the way a round, in logarithm
        ...     return Look((ratio,), torch.ones(1), torch.ones(1), torch.tensor((8 / ratio) ** 0.5))
        >>> ratio, _, rounds = search(look, 1e-3, 1e3)
        >>> round(ratio, 2), rounds
        (7.5, 5)
    """
    ratio, rounds, moved = 1.0, 0, math.inf
    while moved >= _SETTLED and rounds < _MAX_ROUNDS:
        seen = look(ratio)
        before, ratio = ratio, min(max(ratio * seen.factor.item(), lowest), highest)
        moved = abs(math.log(ratio / before))
        rounds += 1
    return ratio, seen, rounds


def steady_state(optimizer: torch.optim.Optimizer) -> float:
    """Return how much smaller the level should be than the rate that suits the first step.

    The first step of SGD has an empty momentum buffer; in the steady state steps are up to 1 / (1 - momentum)
    times longer. The square root of that fitted trials on three networks; neither all of it nor none did. Adam
    needs no such thing: it corrects the bias of its first steps.
    """
    momenta = [group["momentum"] for group in optimizer.param_groups if "dampening" in group]
    return math.sqrt(1.0 - max(momenta, default=0.0))
