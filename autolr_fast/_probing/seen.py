"""What a probe is judged by, and what it saw."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._calibration.search import Found
from .._evaluators import Look
from .._isolation import Closure

__all__ = ["Batch", "Seen", "mean_of", "seen_at", "seen_in_search"]


class Batch(NamedTuple):
    """What candidates are judged by.

    Attributes:
        closure: returns their loss.
        beside: [2], the mean loss since the last probe, and the closure's before the last step, if any is known.
        knows_begin: whether the latter is known.
    """

    closure: Closure
    beside: Tensor | None
    knows_begin: bool


class Seen(NamedTuple):
    """What a probe saw, as in :class:`~autolr_fast.Probe`."""

    factors: tuple[float, ...]
    losses: Tensor
    weights: Tensor
    factor: Tensor
    rounds: int
    retaken: float | None


def mean_of(look: Look, cost: Tensor, again: Found | None = None) -> Tensor:
    """Return the mean loss of the last steps; where it is not known, about where they ended, taken again or not."""
    left = cost if again is None else torch.full_like(cost, again.cost)
    return left if look.training is None else torch.where(look.training.mean.isnan(), left, look.training.mean)


def seen_at(
    look: Look,
    factor: Tensor,
    again: Found | None = None,
    retaken: float | None = None,
    weights: Tensor | None = None,
) -> Seen:
    """Return what a probe saw at one look; without a rule, the lowest loss has all the weight."""
    if weights is None:
        lowest = look.costs == look.costs.nan_to_num(math.inf).amin()
        weights = lowest / lowest.sum().clamp_min(1)
    rounds = 1 if again is None else 1 + again.rounds
    return Seen(tuple(look.factors), look.losses, weights.to(look.losses), factor, rounds, retaken)


def seen_in_search(found: Found, retaken: float | None) -> Seen:
    """Return what the looks of a search saw; the ratio that was found has all the weight."""
    factor = 1.0 if found.why_not else found.ratio
    losses, weights = torch.tensor([found.losses, [each == factor for each in found.factors]], dtype=torch.float64)
    return Seen(
        tuple(found.factors), losses, weights, torch.tensor(factor, dtype=torch.float64), found.rounds, retaken
    )
