"""The training losses of the steps: run again if the step is probed, and their mean since the last probe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._isolation import Closure, ClosureError, Replay
from .._machine.ranks import ProcessGroup, mean_over_ranks

__all__ = ["Losses"]

_MICRO_BATCHES = ("last", "all")
_FOLDED = 64  # losses on an accelerator, from which on they are added up


class Losses:
    """Sees the loss of every step, and remembers what made those of a step that will be probed.

    Between probes no closure, no batch and no random state is kept, and nothing is read back from an accelerator.

    Args:
        model: that the closures call.
        micro_batches: ``"last"`` or ``"all"`` of those of a step are run again.

    Raises:
        ValueError: if ``micro_batches`` is neither.
    """

    def __init__(self, model: nn.Module, micro_batches: str):
        if micro_batches not in _MICRO_BATCHES:
            raise ValueError(f"micro_batches={micro_batches!r} is not known: use 'last' or 'all'")
        self._model = model
        self._micro_batches = micro_batches
        self._step = -1  # that the next losses are of
        self._replay: Replay | None = None
        self._own: list[Tensor] = []  # losses of what is replayed, as they were in training
        self._left: tuple[int, int] | None = None  # a gradient as micro-batches of a step to come left it
        self._sum: float | Tensor = 0.0
        self._count: int | Tensor = 0
        self._pending: list[Tensor] = []

    def remember(self, closure: Closure, step: int, is_first: bool = False) -> None:
        """Remember a closure that is about to run, for the probe of a step.

        Args:
            closure: returns the loss.
            step: that it is of.
            is_first: whether the closures that were remembered for that step before are to be forgotten.
        """
        if self._replay is None or is_first or step != self._step or self._micro_batches == "last":
            self._replay, self._own = Replay(self._model), []
        self._step, self._left = step, None
        self._replay.add(closure)

    @property
    def is_empty(self) -> bool:
        """Whether no closure is remembered."""
        return self._replay is None

    def has(self, step: int) -> bool:
        """Whether a closure is remembered for a step."""
        return self._replay is not None and len(self._replay) > 0 and step == self._step

    def begin_anew(self, step: int, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether closures are remembered for a step, and their gradients are gone: they are no part of it."""
        if not self.has(step):
            return False
        if self._left is None:
            return all(parameter.grad is None for parameter in parameters)
        return self._left != _mark_of_gradient(parameters)

    def came_twice(self) -> bool:
        """Whether no iteration ended since the loss that came last, of the step to come, and that is finite."""
        return self._left is None and (not self._own or bool(self._own[-1].isfinite()))

    def forget_last(self) -> None:
        """Forget the closure that was remembered last: it raised."""
        if self._replay is not None:
            self._replay.drop_last()

    def add(self, loss: Tensor) -> None:
        """See a loss.

        Raises:
            ClosureError: if the closure that is remembered wrote to a tensor that it holds; it is forgotten then.
        """
        if self._replay is not None and len(self._own) < len(self._replay):
            try:
                self._replay.check_last()
            except ClosureError:
                self.forget_last()
                raise
            self._own.append(loss.detach().clone().reshape(()))
        if loss.is_cpu:
            value = loss.item()
            if math.isfinite(value):
                self._sum += value
                self._count += 1
            return
        self._pending.append(loss.detach().clone().reshape(()))  # its memory may be the next loss's
        if len(self._pending) == _FOLDED:
            self._fold()

    def take(self, step: int, parameters: Iterable[nn.Parameter]) -> tuple[Replay | None, Tensor | None]:
        """Return what runs the batch of a step again, and its loss before the step, if known; forget both.

        Where all micro-batches are run again, those of a step to come stay: an iteration ends after each.

        Args:
            step: that was done last.
            parameters: whose gradients tell later whether that step was given up.
        """
        if self._micro_batches == "all" and self.has(step + 1):
            self._left = _mark_of_gradient(parameters)
            return None, None
        replay, own, is_of_earlier = self._replay, self._own, self._left is not None  # none came since
        self._replay, self._own = None, []
        if replay is None or step != self._step or not len(replay) or is_of_earlier:
            return None, None
        return replay, torch.stack(own).double().mean() if len(own) == len(replay) else None

    def seen(self, own: Tensor | None) -> Tensor | None:
        """Return what the losses were, or ``None`` if none came since :meth:`forget`.

        Args:
            own: 0-dim, the loss of the batch before its step, if known.

        Returns:
            [2] float64, on the device of the losses: the mean of the finite ones since then, and ``own``; not a
            number if unknown. Nothing is read back.
        """
        self._fold()
        if isinstance(self._count, int) and self._count == 0 and own is None:
            return None
        total, count = (torch.as_tensor(each, dtype=torch.float64) for each in (self._sum, self._count))
        mean = total / count
        return torch.stack([mean, torch.full_like(mean, math.nan) if own is None else own])

    def forget(self) -> None:
        """Begin a new mean."""
        self._sum, self._count, self._pending = 0.0, 0, []

    def share(self, process_group: ProcessGroup | None, device: torch.device) -> None:
        """Take the mean over ranks for that of this rank.

        Args:
            process_group: the ranks.
            device: on which they exchange it.
        """
        self._fold()
        own = float(self._sum) / int(self._count) if int(self._count) else math.nan
        mean = mean_over_ranks(torch.tensor(own, dtype=torch.float64, device=device), process_group).item()
        if math.isfinite(mean):  # on all ranks alike
            self._sum = mean * int(self._count)

    def state(self) -> tuple[float, int]:
        """Return what :meth:`load` takes."""
        self._fold()
        return float(self._sum), int(self._count)

    def load(self, state: Sequence[Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._sum, self._count = state
        self._pending = []

    def _fold(self) -> None:
        if self._pending:
            losses = torch.stack(self._pending).double()
            finite = losses.isfinite()
            losses = torch.where(finite, losses, 0.0)
            self._sum = self._sum + losses.sum()
            self._count = self._count + finite.sum()
            self._pending = []


def _mark_of_gradient(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return what changes if something writes to the first gradient that there is, or takes it away."""
    gradient = next((parameter.grad for parameter in parameters if parameter.grad is not None), None)
    return (0, 0) if gradient is None else (id(gradient), gradient._version)
