"""The first rate: the search along the first step, repeated until the factor settles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Found", "Look", "is_unseen", "search", "steady_state"]

_MAX_ROUNDS = 80  # FACTORS_3 with exp over minmax moves by up to x 1.29 a round: eight decades
_SETTLED = 0.1  # a round that moves the logarithm of the rate by less ends the search
_UNSEEN = 10.0  # growth where the losses are all equal: the candidates are too close for the precision


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


def search(look: Callable[[float], Look], lowest: float, highest: float) -> Found:
    """Follow the factor until it settles.

    Args:
        look: from a ratio to what the candidates ``ratio * factors`` say.
        lowest: smallest ratio.
        highest: largest ratio.

    Example:
        >>> def look(ratio):  # the best ratio is 8; half of the way a round, in logarithm
        ...     return Look((1, 2), torch.tensor([1.0, 2.0]), torch.ones(2), torch.tensor((8 / ratio) ** 0.5), 1e-7)
        >>> found = search(look, 1e-3, 1e3)
        >>> round(found.ratio, 2), found.rounds
        (7.5, 5)
    """
    ratio, rounds, moved = 1.0, 0, math.inf
    while moved >= _SETTLED and rounds < _MAX_ROUNDS:
        seen = look(ratio)
        factor = _UNSEEN if is_unseen(seen) else seen.factor.item()
        before, ratio = ratio, min(max(ratio * factor, lowest), highest)
        moved = abs(math.log(ratio / before))
        rounds += 1
    return Found(ratio, seen, rounds)


def is_unseen(seen: Look) -> bool:
    """Whether all losses are finite and differ by rounding at most: the candidates are too close to each other."""
    losses = seen.losses
    spread = losses.amax() - losses.amin()
    return bool(losses.isfinite().all() & (spread <= 2 * seen.precision * losses.abs().amax()))


def steady_state(optimizer: torch.optim.Optimizer, warm: bool) -> float:
    """Return how much smaller the level should be than the rate that suits the first step.

    The first step of SGD has an empty momentum buffer; in the steady state steps are up to 1 / (1 - momentum)
    times longer. The square root of that fitted trials on three networks; neither all of it nor none did. Adam
    needs no such thing: it corrects the bias of its first steps.

    Args:
        optimizer: SGD has ``dampening``, and others with a momentum have not.
        warm: whether the buffers held something before that step.
    """
    momenta = [group["momentum"] for group in optimizer.param_groups if "dampening" in group]
    return 1.0 if warm else math.sqrt(1.0 - max(momenta, default=0.0))
