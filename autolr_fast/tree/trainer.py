"""Steps of stacked models: which pass computes the gradients, and of how many models at once."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..isolation import RandomStreams
from ..memory import check_max_memory, free_memory, is_out_of_memory
from ..timing import seconds
from .open_epoch import random_state, set_random_state
from .passes import BatchedPass, LossFunction, Pass, SequentialPass, difference
from .stack import Stack

__all__ = ["METHODS", "Trainer"]

METHODS = ("auto", "batched", "sequential")
_P = TypeVar("_P", bound=Pass)


class Trainer:
    """Trains the models of a stack on one batch after another; all see the same of torch's random numbers.

    Args:
        model: what they are stacked from.
        loss_fn: mean loss of an output and a target.
        method: ``"batched"``: as many models in one pass as memory allows. ``"sequential"``: one after another.
            ``"auto"``: the faster one, measured at the first batch and whenever the number of models is another
            (under :func:`torch.use_deterministic_algorithms` batched, without measuring), or sequential if a model
            cannot be batched.
        max_memory: bytes for the gradients of one pass; by default a quarter of what is free at the first batch.

    Raises:
        ValueError: if an argument is not one of these.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, method: str, max_memory: int | None):
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not known: use one of {', '.join(map(repr, METHODS))}")
        self._model = model
        self._loss_fn = loss_fn
        self._asked = method
        self._max_memory = check_max_memory(max_memory)
        self._pass: Pass | None = None
        self._chunk = 1
        self._half: dict[str, Any] = {}  # of a batch that was interrupted: what its first models have done
        self._measured = 0  # models that there were when the choice was made by measuring
        self._why = ""

    def __repr__(self) -> str:
        return f"{self.method!r}{self._why and f' (auto: {self._why})'}"

    @property
    def method(self) -> str:
        """What runs: ``"batched"`` or ``"sequential"``; what was asked for until that is chosen."""
        if self._pass is None:
            return self._asked
        return "batched" if isinstance(self._pass, BatchedPass) else "sequential"

    def step(self, stack: Stack, lrs: Sequence[float], x: Any, y: Any) -> Tensor:
        """Take an optimizer step with each model; if that was interrupted, with those that are left.

        Args:
            stack: C models.
            lrs: C learning rates.
            x: what a model takes.
            y: the target.

        Returns:
            Their losses before the step, [C].

        Raises:
            RuntimeError: if ``method="batched"`` was asked for and does not serve.
        """
        if not stack.count:
            return torch.empty(0)
        if self._pass is None or (self._measured not in (0, stack.count) and not self._half):
            self._choose(stack, x, y)
        assert self._pass is not None
        half = self._half or {"random": random_state(stack.device), "losses": [], "done": 0}
        random, losses, done = half["random"], half["losses"], half["done"]
        while done < stack.count:
            if done:
                set_random_state(random, stack.device)
            stop = min(done + self._chunk, stack.count)
            try:
                results = self._pass(stack.rows(done, stop), x, y)
            except (RuntimeError, MemoryError) as error:
                if stop - done == 1 or not is_out_of_memory(error):
                    raise
                self._chunk = (stop - done + 1) // 2
                set_random_state(random, stack.device)
                continue
            stack.step(done, stop, results, lrs[done:stop])
            losses.append(results.losses)
            done = stop
            self._half = {"random": random, "losses": losses, "done": done}
        self._half = {}
        stack.count_step(results)
        return torch.cat(losses)

    def begin_epoch(self, stack: Stack) -> None:
        """Take over what has been done to the model since the last epoch, such as a change of an attribute."""
        if self._pass is not None:
            self._pass = self._make(type(self._pass), stack)

    def forget(self) -> None:
        """Forget a batch that was interrupted."""
        self._half = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the choice: a resumed run must not choose anew."""
        chosen = None if self._pass is None else self.method
        return {
            "method": chosen,
            "why": self._why,
            "chunk": self._chunk,
            "measured": self._measured,
            "half": copy.deepcopy(self._half),
        }

    def load_state_dict(self, state: dict[str, Any], stack: Stack | None) -> None:
        """Take over what :meth:`state_dict` returned; the stack is the one that it goes with."""
        self._pass, self._why = None, state["why"]
        self._chunk, self._measured = state["chunk"], state["measured"]
        self._half = copy.deepcopy(state["half"])
        if state["method"] is not None and stack is not None:
            self._pass = self._make(BatchedPass if state["method"] == "batched" else SequentialPass, stack)

    def _make(self, kind: type[_P], stack: Stack) -> _P:
        return kind(self._model, self._loss_fn, stack.parameters, stack.buffers)

    def _choose(self, stack: Stack, x: Any, y: Any) -> None:
        self._chunk = 1
        sequential = self._make(SequentialPass, stack)
        if self._asked == "sequential":
            self._pass = sequential
            return
        batched = self._make(BatchedPass, stack)
        if (reason := difference(sequential, batched, stack.rows(0, 1), x, y)) is not None:
            if self._asked == "batched":
                raise RuntimeError(
                    f"method='batched' cannot serve {type(self._model).__name__}: {reason} (method='sequential' "
                    "works with any model, 'auto' uses what works)"
                )
            self._pass, self._why = sequential, reason
            warnings.warn(
                f"ALRTree trains its branches one after another, since {reason}. Pass method='sequential' to "
                "choose that and silence this.",
                UserWarning,
                stacklevel=2,
            )
            return
        measures = self._asked == "auto" and not torch.are_deterministic_algorithms_enabled()
        self._measured = stack.count if measures else 0
        alone = self._seconds(sequential, stack, 1, x, y) if measures else math.inf
        del sequential  # its copy of the model: the batched pass needs the memory
        self._pass, self._chunk = batched, self._first_chunk(stack)
        if measures and alone <= self._measure(batched, stack, x, y, alone):
            self._pass, self._chunk = self._make(SequentialPass, stack), 1

    def _measure(self, batched: BatchedPass, stack: Stack, x: Any, y: Any, alone: float) -> float:
        """Return the seconds that a model takes of a batched pass; alone it takes as many as given."""
        while True:
            count = min(self._chunk, stack.count)
            try:
                each = self._seconds(batched, stack, count, x, y) / count
                break
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                self._chunk = (count + 1) // 2
        self._why = f"a model takes {1e3 * each:.3g} ms batched, {1e3 * alone:.3g} ms alone"
        return each

    @staticmethod
    def _seconds(kind: Pass, stack: Stack, count: int, x: Any, y: Any) -> float:
        random = RandomStreams()
        taken = seconds(lambda: kind(stack.rows(0, count), x, y).losses)
        random.restore()
        return taken

    def _first_chunk(self, stack: Stack) -> int:
        rows = stack.rows(0, 1).parameters
        gradients = sum(tensor.numel() * tensor.element_size() for tensor in rows)
        budget = self._max_memory or free_memory(rows[0].device) // 4
        return max(1, budget // max(1, gradients))
