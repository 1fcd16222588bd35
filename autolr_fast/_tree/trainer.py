"""Steps of stacked models: which pass computes the gradients, and of how many models at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .._isolation import RandomStreams
from .._machine.memory import check_max_memory, free_memory, is_out_of_memory
from .._machine.timing import seconds
from .._machine.warning import warn
from .epoch import EpochInProgress
from .passes import BatchedPass, LossFunction, Pass, Results, Rows, SequentialPass, difference
from .random_numbers import RandomNumbers
from .stack import Stack

__all__ = ["Trainer"]

T = TypeVar("T")
_METHODS = ("auto", "batched", "sequential")


class Trainer:
    """Trains the models of a stack on one batch after another; all see the same of torch's random numbers.

    Of the two methods it takes the one that was asked for, or that serves; see :class:`ALRTree`.

    Raises:
        ValueError: if an argument is not one of these.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, method: str, max_memory: int | None):
        if method not in _METHODS:
            raise ValueError(f"method={method!r} is not known: use one of {', '.join(map(repr, _METHODS))}")
        self._model, self._loss_fn = model, loss_fn
        self._random = RandomNumbers(model)
        self._asked = method
        self._max_memory = check_max_memory(max_memory)
        self._chosen = ""
        self._reason = ""
        self._chunk_models = 1  # at most so many in a pass
        self._measured_models = 0  # there were so many when the choice was made by measuring
        self._pass: Pass | None = None

    def __repr__(self) -> str:
        return f"{self.method!r}{self._reason and f' (auto: {self._reason})'}"

    @property
    def method(self) -> str:
        """What runs: ``"batched"`` or ``"sequential"``; what was asked for until that is chosen."""
        return self._chosen or self._asked

    def begin_epoch(self) -> None:
        """Take over what has been done to the model since the last epoch, such as a change of an attribute."""
        self._pass = None

    def step(self, stack: Stack, epoch: EpochInProgress, x: Any, y: Any) -> None:
        """Take an optimizer step with each model that has not taken it in this batch; tell the epoch the losses.

        Raises:
            RuntimeError: if ``method="batched"`` was asked for and does not serve.
        """
        if not epoch.losses_in_batch:
            epoch.random_in_batch = self._random.state()
        if not len(stack):
            return
        is_measured_anew = self._measured_models not in (0, len(stack)) and not epoch.models_done
        if not self._chosen or is_measured_anew:
            self._choose(stack, x, y)
        if self._pass is None:
            kind = BatchedPass if self._chosen == "batched" else SequentialPass
            self._pass = kind(self._model, self._loss_fn, stack.buffers)
        train = self._pass

        def run(rows: Rows) -> Results:
            self._random.restore(epoch.random_in_batch)
            return train(rows, x, y)

        while (start := epoch.models_done) < len(stack):
            stop, results = self._as_many_as_fit(stack, start, run)
            stack.step(start, stop, results, epoch.lrs[start:stop])
            epoch.losses_in_batch = [*epoch.losses_in_batch, results.losses]

    def state_dict(self) -> dict[str, Any]:
        """Return the choice: a resumed run must not choose anew."""
        return {
            "method": self._chosen,
            "reason": self._reason,
            "chunk_models": self._chunk_models,
            "measured_models": self._measured_models,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._chosen, self._reason = state["method"], state["reason"]
        self._chunk_models, self._measured_models = state["chunk_models"], state["measured_models"]
        self._pass = None

    def _choose(self, stack: Stack, x: Any, y: Any) -> None:
        self._pass, self._chunk_models, self._measured_models = None, 1, 0
        if self._asked == "sequential":
            self._chosen = "sequential"
            return
        arguments = (self._model, self._loss_fn, stack.buffers)
        sequential, batched = SequentialPass(*arguments), BatchedPass(*arguments)
        one = stack.rows(0, 1)
        if (reason := difference(sequential, batched, one, x, y)) is not None:
            if self._asked == "batched":
                raise RuntimeError(
                    f"method='batched' cannot serve {type(self._model).__name__}: {reason} (method='sequential' "
                    "works with any model, 'auto' uses what works)"
                )
            self._chosen, self._reason = "sequential", reason
            warn(
                f"ALRTree trains its branches one after another, since {reason}. Pass method='sequential' to "
                "choose that and silence this."
            )
            return
        measures = self._asked == "auto" and not torch.are_deterministic_algorithms_enabled()
        self._measured_models = len(stack) if measures else 0
        alone = _seconds(sequential, one, x, y) if measures else math.inf
        del sequential  # its copy of the model: the batched pass needs the memory
        gradients = sum(rows.nbytes for rows in one.parameters.values())
        budget = self._max_memory or free_memory(next(iter(one.parameters.values())).device) // 4
        self._chunk_models = max(1, budget // max(1, gradients))
        chosen = "batched"
        if measures:
            models, taken = self._as_many_as_fit(stack, 0, lambda rows: _seconds(batched, rows, x, y))
            each = taken / models
            self._reason = f"a model takes {1e3 * each:.3g} ms batched, {1e3 * alone:.3g} ms alone"
            if each >= alone:
                chosen, self._chunk_models = "sequential", 1
        self._chosen = chosen

    def _as_many_as_fit(self, stack: Stack, start: int, run: Callable[[Rows], T]) -> tuple[int, T]:
        """Run the models from ``start`` on, half as many whenever memory runs out; return where they stop."""
        while True:
            stop = min(start + self._chunk_models, len(stack))
            try:
                return stop, run(stack.rows(start, stop))
            except (RuntimeError, MemoryError) as error:
                if stop - start == 1 or not is_out_of_memory(error):
                    raise
            self._chunk_models = (stop - start + 1) // 2


def _seconds(run: Pass, rows: Rows, x: Any, y: Any) -> float:
    random = RandomStreams()
    taken = seconds(lambda: run(rows, x, y).losses)
    random.restore()
    return taken
