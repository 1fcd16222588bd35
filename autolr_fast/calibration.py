"""The first rate: the search along the first step, repeated until the factor settles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Found", "Look", "is_unseen", "search", "steady_state"]

_MAX_ROUNDS = 80  # about 20 are needed for eight decades
_WIDEST = 8  # power of the factors
_SETTLED = 0.1  # a round that moves the logarithm of the rate by less, per power of the factors, has settled
_CAUTION = 1 / 3  # the level after the first step, at most, in units of the rate that suits that step
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


def search(look: Callable[[float, int], Look], lowest: float, highest: float) -> Found:
    """Follow the factor until it settles.

    The candidates lie further apart each round while the factor keeps its direction, and closer again afterwards.

    Args:
        look: from a ratio and a power to what the candidates ``ratio * factors ** power`` say.
        lowest: smallest ratio.
        highest: largest ratio.

    Example:
        >>> def look(ratio, power):  # the best ratio is 8000; a round goes there, but by no more than a factor of 2
        ...     factor = min(2.0, (8000 / ratio) ** (1 / power))
        ...     return Look((1, 2), torch.tensor([1.0, 2.0]), torch.ones(2), torch.tensor(factor), 1e-7)
        >>> found = search(look, 1e-6, 1e6)
        >>> round(found.ratio), found.rounds
        (8000, 8)
    """
    ratio, rounds, power = 1.0, 0, 1
    before, turned = 0.0, False  # the last move of the ratio's logarithm; whether it has turned once
    back_and_forth = 0  # turns of candidates as close as they get: two of them never say that they are close
    while rounds < _MAX_ROUNDS:
        seen = look(ratio, power)
        factor = _UNSEEN if is_unseen(seen) else seen.factor.item() ** power
        wanted = min(max(ratio * factor, lowest), highest)
        moved, ratio = math.log(wanted / ratio), wanted
        rounds += 1
        settled = abs(moved) < _SETTLED * power
        if settled and power == 1:
            break
        turns = moved * before < 0
        back_and_forth += turns and power == 1
        if back_and_forth == 2:
            break
        turned = turned or turns or settled
        if not turned:
            power = min(2 * power, _WIDEST)
        elif turns or settled:
            power = max(power // 2, 1)
        before = moved
    return Found(ratio, seen, rounds)


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
