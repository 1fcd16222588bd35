"""The ways to turn losses into weights that are compared: a normalisation and a score each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autolr_fast.rule import Transform

__all__ = ["RULES"]

_STAY = 0.01  # what the unscaled step weighs: as much as one that lowers the loss by 1 %


def _softmax(temperature: float) -> Transform:
    return lambda losses: torch.softmax(-losses / temperature, 0)


def _rank(losses: Tensor) -> Tensor:
    """Return the place of each loss, 0 for the lowest to 1 for the highest."""
    return losses.argsort().argsort().to(losses.dtype) / max(1, len(losses) - 1)


def _improvement(losses: Tensor) -> Tensor:
    """Return by what share each loss is below that of the unscaled step, whose factor is the middle one."""
    unscaled = len(losses) // 2
    gain = ((losses[unscaled] - losses) / losses[unscaled].abs().clamp_min(1e-12)).clamp_min(0)
    gain[unscaled] = _STAY
    return gain


RULES: Mapping[str, tuple[str | Transform, str | Transform]] = {
    "minmax": ("minmax", "exp"),
    "zscore": ("zscore", "exp"),
    "sum": ("sum", "exp"),
    "softmax-0.1": ("none", _softmax(0.1)),
    "softmax-0.01": ("none", _softmax(0.01)),
    "rank": (_rank, "exp"),
    "improvement": ("none", _improvement),
}
"""``normalize`` and ``score`` of :class:`autolr_fast.Rule` by name; a softmax has its temperature behind it."""
