"""From a line and factors to losses that a rule can decide by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._isolation import Closure, check_repeatable
from .._machine.ranks import ProcessGroup, mean_over_ranks
from .._steps import Line
from .base import Evaluator

__all__ = ["Look", "Prober"]


class Look(NamedTuple):
    """The losses of all candidates on a line.

    Attributes:
        factors: N, of the step that was taken.
        losses: [N] float64, averaged over ranks.
        costs: [N] float64, the lower the better: the losses, or their negatives where the optimizer maximizes.
        precision: the relative rounding error of the losses.
    """

    factors: Sequence[float]
    losses: Tensor
    costs: Tensor
    precision: float


class Prober:
    """Looks at the losses along a line, and leaves no trace.

    Args:
        model: what the closures call; kept as an attribute, as are the next two.
        evaluator: how the losses come about.
        process_group: the ranks whose losses are averaged.
        maximize: whether a higher loss is better.
        device: where the losses are wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        process_group: ProcessGroup | None,
        maximize: bool,
        device: torch.device,
    ):
        self.model = model
        self.evaluator = evaluator
        self.process_group = process_group
        self._maximize = maximize
        self._device = device
        self._is_repeatable = False

    def look(self, line: Line, closure: Closure, factors: Sequence[float]) -> Look:
        """Return the losses at N factors.

        Raises:
            ClosureError: if the closure does not return a scalar loss, calls backward, or does not repeat itself.
        """
        if not self._is_repeatable:
            check_repeatable(self.model, closure)
            self._is_repeatable = True
        seen = self.evaluator.losses(self.model, line, factors, closure)
        losses = mean_over_ranks(seen.double(), self.process_group).to(self._device)
        return Look(factors, losses, -losses if self._maximize else losses, torch.finfo(seen.dtype).eps)
