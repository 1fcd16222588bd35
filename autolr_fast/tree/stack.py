"""Stacked models: parameters, the buffers that a forward changes, and the state of their optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import StackedBuffer
from .optimizers import StackedOptimizer
from .passes import Results, Rows

__all__ = ["Stack"]


class Stack:
    """Up to ``capacity`` models of one architecture, of which the first ``count`` are there.

    Args:
        model: gives shapes, and values to start from.
        parameters: names of what is stacked.
        buffers: names of the buffers that its forward changes.
        optimizer: what it keeps is stacked too.
        capacity: the most models at once.

    Attributes:
        parameters: names of what is stacked.
        buffers: names of the buffers that are.
        count: models that are there.
        taken: for each parameter, the optimizer steps taken with it.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[str],
        buffers: Sequence[str],
        optimizer: StackedOptimizer,
        capacity: int,
    ):
        self.parameters = list(parameters)
        self.buffers = list(buffers)
        self._optimizer = optimizer
        live = [model.get_parameter(name).detach() for name in parameters]
        self._parameters = StackedBuffer(live, capacity).stacked
        self._buffers = [
            torch.empty((capacity, *value.shape), dtype=value.dtype, device=value.device)
            for value in map(model.get_buffer, buffers)
        ]
        self._state = [[torch.zeros_like(rows) for rows in self._parameters] for _ in optimizer.buffers]
        self.count = 0
        self.taken = [0] * len(live)

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return self._parameters[0].device

    @torch.no_grad()
    def fill(self, model: nn.Module, count: int) -> None:
        """Become as many copies of a model, before their first optimizer step."""
        self.count = count
        for rows, name in zip(self._parameters, self.parameters, strict=True):
            rows[:count].copy_(model.get_parameter(name))
        for rows, name in zip(self._buffers, self.buffers, strict=True):
            rows[:count].copy_(model.get_buffer(name))
        for rows in self._optimizer_rows():
            rows.zero_()
        self.taken = [0] * len(self._parameters)

    @torch.no_grad()
    def put(self, index: int, model: nn.Module) -> None:
        """Write one model's parameters and buffers into the live ones of a module."""
        for rows, name in zip(self._parameters, self.parameters, strict=True):
            model.get_parameter(name).copy_(rows[index])
        for rows, name in zip(self._buffers, self.buffers, strict=True):
            model.get_buffer(name).copy_(rows[index])

    def rows(self, start: int, stop: int) -> Rows:
        """Return the models ``start`` to ``stop``, in the same memory."""
        return Rows(self._parameters, self._buffers).part(start, stop)

    @torch.no_grad()
    def select(self, indices: Sequence[int]) -> None:
        """Keep the models of these indices, in this order; one may be there several times."""
        for tensor in self.tensors():
            tensor[: len(indices)] = tensor[list(indices)]
        self.count = len(indices)

    @torch.no_grad()
    def step(self, start: int, stop: int, results: Results, lrs: Sequence[float]) -> None:
        """Take an optimizer step with the models ``start`` to ``stop``; :meth:`count_step` ends the step of all.

        Args:
            start: first model.
            stop: one after the last.
            results: of these models.
            lrs: their learning rates.
        """
        for rows, values in zip(self._buffers, results.buffers, strict=True):
            rows[start:stop] = values
        alike: dict[int, list[int]] = {}  # parameters that took as many steps
        for index, gradient in enumerate(results.gradients):
            if gradient is not None:
                alike.setdefault(self.taken[index], []).append(index)
        for taken, indices in alike.items():
            self._optimizer.step(
                [self._parameters[i][start:stop] for i in indices],
                [gradient for i in indices if (gradient := results.gradients[i]) is not None],
                [[rows[i][start:stop] for i in indices] for rows in self._state],
                taken,
                lrs,
            )

    def count_step(self, results: Results) -> None:
        """Note that all models took a step."""
        for index, gradient in enumerate(results.gradients):
            self.taken[index] += gradient is not None

    def tensors(self) -> list[Tensor]:
        """Return all that is stacked, ``[capacity, *shape]``."""
        return [*self._parameters, *self._buffers, *self._optimizer_rows()]

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that is there, by name."""
        state: dict[str, Any] = {"count": self.count, "taken": list(self.taken)}
        for kind, names, stacked in self._kinds():
            state[kind] = {name: rows[: self.count].clone() for name, rows in zip(names, stacked, strict=True)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, of a stack of the same model and optimizer.

        Raises:
            ValueError: if it is of another; nothing is loaded then.
        """
        kinds = self._kinds()
        if unknown := sorted(set(state) - {"count", "taken", *(kind for kind, *_ in kinds)}):
            raise ValueError(f"state_dict holds {unknown[0]!r}: give ALRTree the optimizer that it is of")
        for kind, names, stacked in kinds:
            shapes = {name: (state["count"], *rows.shape[1:]) for name, rows in zip(names, stacked, strict=True)}
            given = {name: tuple(rows.shape) for name, rows in state.get(kind, {}).items()}
            if shapes != given:
                raise ValueError(
                    f"state_dict holds {kind} of the shapes {given} and this tree expects {shapes}: give ALRTree "
                    "the same model and optimizer"
                )
        if state["count"] > len(self._parameters[0]):
            raise ValueError(
                f"state_dict holds {state['count']} models and this tree has room for {len(self._parameters[0])}: "
                "give ALRTree the same beams and factors"
            )
        self.count, self.taken = state["count"], list(state["taken"])
        for kind, names, stacked in kinds:
            for name, rows in zip(names, stacked, strict=True):
                rows[: self.count].copy_(state[kind][name])

    def _optimizer_rows(self) -> list[Tensor]:
        return [rows for stacked in self._state for rows in stacked]

    def _kinds(self) -> list[tuple[str, list[str], list[Tensor]]]:
        return [
            ("parameters", self.parameters, self._parameters),
            ("buffers", self.buffers, self._buffers),
            *(
                (name, self.parameters, rows)
                for name, rows in zip(self._optimizer.buffers, self._state, strict=True)
            ),
        ]
