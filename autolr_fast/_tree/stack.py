"""Stacked models: parameters, the buffers that a forward changes, and the state of their optimizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._ops.buffer import StackedBuffer
from .checkpoint import check_same_shapes
from .optimizers import StackedOptimizer
from .passes import Results, Rows, rows_of
from .ranks import Ranks

__all__ = ["Stack"]


class Stack:
    """The models of a search: its beams between two epochs, and this rank's branches within one.

    Args:
        model: what all of them have the shapes of.
        buffers: names of the buffers that its forward changes, stacked as its parameters are.
        optimizer: takes their steps; what it keeps is stacked too.
        capacity: the most models at once.
        copies: models that there are at first, all of them the given one before its first optimizer step.
    """

    def __init__(
        self, model: nn.Module, buffers: Collection[str], optimizer: StackedOptimizer, capacity: int, copies: int
    ):
        self._optimizer = optimizer
        live = rows_of(model, buffers)
        values = [*live.parameters.values(), *live.buffers.values()]
        stacked = StackedBuffer([value[0] for value in values], capacity).stacked
        for rows, value in zip(stacked, values, strict=True):
            rows[:copies] = value
        self._parameters = dict(zip(live.parameters, stacked, strict=False))
        self._buffers = dict(zip(live.buffers, stacked[len(live.parameters) :], strict=True))
        self._kinds = {"parameters": self._parameters, "buffers": self._buffers}
        for kind in optimizer.buffers:
            self._kinds[kind] = {name: torch.zeros_like(rows) for name, rows in self._parameters.items()}
        self._count = copies
        self._steps_taken = dict.fromkeys(live.parameters, 0)

    def __len__(self) -> int:
        """Models that there are."""
        return self._count

    @property
    def buffers(self) -> Collection[str]:
        """Names of the buffers that are stacked."""
        return self._buffers

    def rows(self, start: int, stop: int) -> Rows:
        """Return the models ``start`` to ``stop``, in the same memory."""
        return Rows(*(_some(stacked, start, stop) for stacked in (self._parameters, self._buffers)))

    @torch.no_grad()
    def branch(self, parents: Sequence[int]) -> None:
        """Become branches, each a copy of the beam of this index."""
        for rows in self._tensors():
            rows[: len(parents)] = rows[list(parents)]
        self._count = len(parents)

    @torch.no_grad()
    def step(self, start: int, stop: int, results: Results, lrs: Sequence[float]) -> None:
        """Take an optimizer step with the models ``start`` to ``stop``, at their learning rates.

        The step of a batch ends with the last model's.
        """
        for name, values in results.buffers.items():
            self._buffers[name][start:stop] = values
        gradients, taken = results.gradients, self._steps_taken
        for steps in {taken[name] for name in gradients}:
            alike = [name for name in gradients if taken[name] == steps]
            params, *state = (
                [self._kinds[kind][name][start:stop] for name in alike]
                for kind in ("parameters", *self._optimizer.buffers)
            )
            self._optimizer.step(params, [gradients[name] for name in alike], state, steps, lrs)
        if stop == self._count:
            self._steps_taken = {name: steps + (name in gradients) for name, steps in taken.items()}

    @torch.no_grad()
    def prune(self, survivors: Sequence[int], branches: int, ranks: Ranks) -> None:
        """Become beams: the survivors, best first, of so many branches on all ranks."""
        ranks.broadcast_survivors(self._tensors(), survivors, branches)
        self._count = len(survivors)
        # A rank without branches took no steps.
        steps = ranks.values_of_first(torch.tensor(list(self._steps_taken.values())))
        self._steps_taken = dict(zip(self._parameters, steps.tolist(), strict=True))

    @torch.no_grad()
    def write_best(self, model: nn.Module) -> None:
        """Write the first beam's parameters and buffers into those of a module."""
        for name, rows in self._parameters.items():
            model.get_parameter(name).copy_(rows[0])
        for name, rows in self._buffers.items():
            model.get_buffer(name).copy_(rows[0])

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that is there, by name."""
        tensors = {
            kind: {name: rows[: self._count].clone() for name, rows in named.items()}
            for kind, named in self._kinds.items()
        }
        return {"steps_taken": list(self._steps_taken.values()), "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another model or optimizer, or of too many models; nothing is loaded then.
        """
        count = max(map(len, state["tensors"]["parameters"].values()), default=0)
        own = {kind: _some(named, 0, count) for kind, named in self._kinds.items()}
        check_same_shapes(own, state["tensors"])
        for kind, named in own.items():
            for name, rows in named.items():
                rows.copy_(state["tensors"][kind][name])
        self._count = count
        self._steps_taken = dict(zip(self._parameters, state["steps_taken"], strict=True))

    def _tensors(self) -> list[Tensor]:
        return [rows for named in self._kinds.values() for rows in named.values()]


def _some(stacked: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: rows[start:stop] for name, rows in stacked.items()}
