"""From a line and factors to losses that a rule can decide by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._isolation import (
    Closure,
    Inventory,
    Isolation,
    NeedsGradientsError,
    Probed,
    Replay,
    check_repeatable,
    probed,
)
from .._machine.ranks import ProcessGroup, is_distributed, is_sharded, mean_over_ranks
from .._machine.warning import warn
from .._steps import Line
from .base import Evaluator
from .inplace import InPlace, rewritten

__all__ = ["Look", "Prober"]

_SAME = 1e-3  # of a loss: some GPU operations add up in another order each time


class Seen(NamedTuple):
    """What training itself has seen, as costs; 0-dim float64 each, not a number if unknown.

    Attributes:
        mean: of all steps since the last probe.
        own: of the closure, before the last step.
    """

    mean: Tensor
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
        self._needs_gradients = False  # of the closures so far
        self._inventory: Inventory | None = None  # of the model, if keeping it costs nothing
        self._repeats_training = True  # what the closures return is what training saw

    def look(
        self,
        line: Line,
        closure: Closure,
        factors: Sequence[float],
        beside: Tensor | None = None,
        known: float | None = None,
    ) -> Look:
        """Return the losses at N factors.

        Args:
            line: where the candidates lie.
            closure: returns the scalar loss.
            factors: N factors, one a candidate.
            beside: [2], what :class:`Seen` holds, as losses; they travel with these between ranks and devices.
            known: the factor at which the last of these is the loss, if any: it is not evaluated there.

        Raises:
            ClosureError: if the closure does not return a scalar loss, calls backward, writes to a tensor that it
                holds, or does not repeat itself.
        """
        watched = probed(closure)
        watched.needs_gradients = self._needs_gradients
        watched.inventory = watched.inventory or self._inventory
        seen = self._losses(line, watched, factors, beside, known)
        self._needs_gradients = watched.needs_gradients
        self._inventory = watched.inventory if watched.inventory and watched.inventory.is_plain else None
        all_losses = seen.double() if beside is None else torch.cat([seen.double(), beside.to(seen.device)])
        all_losses = mean_over_ranks(all_losses, self.process_group).to(self._device)
        losses, more = all_losses[: len(seen)], all_losses[len(seen) :]
        if len(seen) < len(factors):
            evaluated = iter(losses)
            losses = torch.stack([more[-1] if factor == known else next(evaluated) for factor in factors])
        training = None
        if beside is not None:
            training = Seen(*self._cost(more).unbind())
        return Look(factors, losses, self._cost(losses), torch.finfo(seen.dtype).eps, training)

    def training(self, beside: Tensor) -> Seen:
        """Return what training has seen, [2] as losses on this rank, as costs of all ranks."""
        return Seen(*self._cost(mean_over_ranks(beside, self.process_group).to(self._device)).unbind())

    def _cost(self, loss: Tensor) -> Tensor:
        return -loss if self._maximize else loss

    def _losses(
        self, line: Line, closure: Probed, factors: Sequence[float], beside: Tensor | None, known: float | None
    ) -> Tensor:
        """Return the losses that are not known, evaluated with gradients on if the closure fails without."""
        if not closure.needs_gradients:
            with suppress(NeedsGradientsError):
                return self._checked_losses(line, closure, factors, beside, known)
            closure.needs_gradients = True
        return self._checked_losses(line, closure, factors, beside, known)

    def _checked_losses(
        self, line: Line, closure: Probed, factors: Sequence[float], beside: Tensor | None, known: float | None
    ) -> Tensor:
        if not self._is_checked:
            at = 0.0 if known is None and line.window == 1 else known
            self._check(line, closure, math.nan if beside is None or at is None else beside[-1].item(), at or 0.0)
            self._is_checked = True
        asked = [factor for factor in factors if factor != known or not self._repeats_training]
        return self.evaluator.losses(self.model, line, asked, closure)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _check(self, line: Line, closure: Probed, own: float, at: float) -> None:
        """See that the closure returns the same loss each time, and where the step began, that of the step.

        Training ran it with gradients on. Where the loss is another without, candidates are evaluated with them.

        Args:
            line: where the candidates lie.
            closure: returns the loss.
            own: that which training saw; not a number if unknown.
            at: the factor of the line at which training saw it.
        """
        if not math.isfinite(own) or is_distributed():  # ranks might not do the same
            with rewritten(self._trained()):  # the forward may write to them
                without = check_repeatable(self.model, closure)
                if isinstance(closure, Replay) and not closure.needs_gradients and not is_sharded(self.model):
                    closure.needs_gradients = self._differs_with_gradients(closure, without)
            return
        again = InPlace().losses(self.model, line, [at], closure).item()
        if math.isclose(again, own, rel_tol=_SAME):
            return
        if not closure.needs_gradients:
            closure.needs_gradients = True
            twice = InPlace().losses(self.model, line, [at, at], closure).tolist()  # once may be chance
            if all(math.isclose(each, own, rel_tol=_SAME) for each in twice):
                return
            closure.needs_gradients = False
        with rewritten(self._trained()):
            check_repeatable(self.model, closure)
        self._repeats_training = False
        warn(
            f"scheduler.loss returned {own:.6g}, and the closure now returns {again:.6g} at the same "
            "parameters: probes are not judged by the loss of the step. The closure reads something that has "
            "changed since: a batch that a function inside of it looks up late, or changes in place, or what "
            "the model keeps from one forward to the next, or parameters that an optimizer moves which AutoLR was "
            "not given. Pass the batch as in partial(loss_of, x, y), and all optimizers as AutoLR([a, b], model)"
        )

    def _differs_with_gradients(self, closure: Replay, without: Tensor) -> bool:
        """Whether the loss is another with gradients on, on any rank."""
        closure.needs_gradients = True
        with Isolation(self.model, closure) as isolation:
            loss = isolation.run(closure).double()
        differs = ~torch.isclose(loss, without, rtol=_SAME, atol=0.0, equal_nan=True)
        return bool(mean_over_ranks(differs.double(), self.process_group) > 0)
