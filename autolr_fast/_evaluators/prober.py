"""From a line and factors to losses that a rule can decide by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._isolation import Closure, check_repeatable
from .._machine.ranks import ProcessGroup, is_distributed, mean_over_ranks
from .._machine.warning import warn
from .._steps import Line
from .base import Evaluator
from .inplace import InPlace

__all__ = ["Look", "Prober"]

_SAME = 1e-3  # of a loss: some GPU operations add up in another order each time


class Seen(NamedTuple):
    """What training itself has seen, as costs; 0-dim float64 each, not a number if unknown.

    Attributes:
        mean: of all steps since the last probe.
        variance: of that mean.
        own: of the closure, before the last step.
    """

    mean: Tensor
    variance: Tensor
    own: Tensor


class Look(NamedTuple):
    """The losses of all candidates on a line.

    Attributes:
        factors: N, of the step that was taken.
        losses: [N] float64, averaged over ranks.
        costs: [N] float64, the lower the better: the losses, or their negatives where the optimizer maximizes.
        precision: the relative rounding error of the losses.
        training: what came beside them, if anything did.
    """

    factors: Sequence[float]
    losses: Tensor
    costs: Tensor
    precision: float
    training: Seen | None = None


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
        self._is_checked = False

    def look(self, line: Line, closure: Closure, factors: Sequence[float], beside: Tensor | None = None) -> Look:
        """Return the losses at N factors.

        Args:
            line: where the candidates lie.
            closure: returns the scalar loss.
            factors: N factors, one a candidate.
            beside: [3], what :class:`Seen` holds, as losses; they travel with these between ranks and devices.

        Raises:
            ClosureError: if the closure does not return a scalar loss, calls backward, or does not repeat itself.
        """
        if not self._is_checked:
            self._check(line, closure, beside)
            self._is_checked = True
        seen = self.evaluator.losses(self.model, line, factors, closure)
        all_losses = seen.double() if beside is None else torch.cat([seen.double(), beside.to(seen.device)])
        all_losses = mean_over_ranks(all_losses, self.process_group).to(self._device)
        losses, more = all_losses[: len(factors)], all_losses[len(factors) :]
        training = None
        if beside is not None:
            mean, variance, own = more.unbind()
            training = Seen(self._cost(mean), variance, self._cost(own))
        return Look(factors, losses, self._cost(losses), torch.finfo(seen.dtype).eps, training)

    def _cost(self, loss: Tensor) -> Tensor:
        return -loss if self._maximize else loss

    def _check(self, line: Line, closure: Closure, beside: Tensor | None) -> None:
        """See that the closure returns the same loss each time, and where the step began, that of the step."""
        own = math.nan if beside is None or line.window != 1 or is_distributed() else beside[-1].item()
        if not math.isfinite(own):  # unknown, or ranks might not do the same
            check_repeatable(self.model, closure)
            return
        again = InPlace().losses(self.model, line, [0.0], closure).item()
        if not math.isclose(again, own, rel_tol=_SAME):
            check_repeatable(self.model, closure)
            warn(
                f"scheduler.loss returned {own:.6g}, and the closure now returns {again:.6g} at the same "
                "parameters: probes are not judged by the loss of the step. The closure reads something that has "
                "changed since: a batch that a function inside of it looks up late, or changes in place, or what "
                "the model keeps from one forward to the next. Pass the batch as in partial(loss_of, x, y)"
            )
