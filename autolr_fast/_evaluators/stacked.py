"""All candidates in one stacked buffer, evaluated by one batched forward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._isolation import Closure, ClosureError, Isolation, scalar_loss
from .._machine.memory import check_max_memory, free_memory, is_out_of_memory
from .._ops.buffer import StackedBuffer
from .._ops.writers import MAX_ROWS
from .._steps import Line
from .base import Evaluator, EvaluatorError
from .inplace import InPlace
from .nearby import Nearby
from .streamed import Checked, check_reach
from .substitution import Substitution, run_eagerly
from .vmap_rules import FusedLayers
from .watch import BufferPlace

__all__ = ["Stacked"]


class Stacked(Evaluator):
    """Writes all candidates into one buffer by one kernel, and reads them by one batched forward (``vmap``).

    Choose ``evaluator="stacked"`` for many factors, or for models that wait for launches. The extra memory is N
    copies of the parameters, kept from probe to probe, and the activations of as many forwards. The buffer holds
    fewer copies if they do not fit ``max_memory``, or if memory runs out.

    The losses at two sets of weights nearby are compared with those one after another, the first time a model is
    seen. The comparison notices an operation that ``vmap`` treats differently. It is repeated for other parameters
    of a model.

    Args:
        max_memory: bytes for the buffer; by default a quarter of the memory that is free on the parameters' device
            when the buffer is first made.

    Raises:
        ValueError: if ``max_memory`` is not a positive whole number.

    Examples:
        >>> from autolr_fast import FACTORS_7, AutoLR, Rule
        >>> model = nn.Linear(4, 1)
        >>> options = {"rule": Rule(FACTORS_7), "evaluator": Stacked(max_memory=2**30)}
        >>> AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), model, **options).evaluator.name
        'stacked'
    """

    name = "stacked"

    def __init__(self, max_memory: int | None = None):
        self.max_memory = check_max_memory(max_memory)
        self._chunk: int | None = None  # candidates in one forward
        self._buffer: StackedBuffer | None = None
        self._checked = Checked()
        self._changing: list[BufferPlace] = []  # buffers that the forward changes: each candidate has its own

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see `Evaluator.losses`.

        Raises:
            EvaluatorError: if the model cannot be batched, or gives other losses then.
        """
        return self._checked.losses(
            model,
            line,
            check=lambda: self._check(model, line, closure),
            evaluate=lambda: self._in_chunks(model, line, factors, closure),
            in_place=lambda: InPlace().losses(model, line, factors, closure),
        )

    def state(self) -> dict[str, Any]:
        """Return the chunk size: another one may round differently."""
        return {"chunk": self._chunk}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the chunk size."""
        self._chunk = state["chunk"]

    def _check(self, model: nn.Module, line: Line, closure: Closure) -> None:
        # One after another first: what is the closure's own fault raises as itself.
        forward = check_reach(self.name, model, line, closure)
        self._changing, expected = forward.changing, list(forward.losses.values())
        try:
            batched = self._in_chunks(model, Nearby(line.parameters), list(forward.losses), closure)[0].tolist()
        except (ClosureError, StopIteration):
            raise
        except Exception as error:
            raise EvaluatorError(self.name, model, f"{type(error).__name__}: {error}") from error
        # No absolute tolerance: a loss may be small as a whole.
        are_close = partial(math.isclose, rel_tol=5e-2 if forward.is_coarse else 1e-3)
        if not all(map(are_close, batched, expected)):
            raise EvaluatorError(
                self.name,
                model,
                f"batched, the test losses are {batched} and should be {expected}; it uses an operation, such as "
                "dropout inside attention, that vmap treats differently",
            )

    def _in_chunks(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure
    ) -> tuple[Tensor, frozenset[int]]:
        """Return the losses, and the indices of the parameters that were used."""
        if self._chunk is None:
            self._chunk = self._first_chunk(line)
        losses: list[Tensor] = []
        used: frozenset[int] = frozenset()
        done = 0
        with Isolation(model, closure) as isolation, run_eagerly():
            while done < len(factors):
                chunk = factors[done : done + self._chunk]
                try:
                    chunk_losses, used = self._at_once(model, line, chunk, closure, isolation)
                    losses.append(chunk_losses)
                except (RuntimeError, MemoryError) as error:
                    if len(chunk) == 1 or not is_out_of_memory(error):
                        raise
                    self._chunk = (len(chunk) + 1) // 2
                    self._buffer = None
                else:
                    done += len(chunk)
        return torch.cat(losses), used

    def _first_chunk(self, line: Line) -> int:
        one = sum(parameter.numel() * parameter.element_size() for parameter in line.parameters)
        budget = self.max_memory or free_memory(line.parameters[0].device) // 4
        return min(MAX_ROWS, max(1, budget // max(1, one)))

    @torch.no_grad()
    def _at_once(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure, isolation: Isolation
    ) -> tuple[Tensor, frozenset[int]]:
        buffers = [buffer for place in self._changing if (buffer := place.find()) is not None]
        tensors = [*line.parameters, *buffers]
        rows = self._candidates(line, factors)
        rows += [buffer.expand(len(factors), *buffer.shape).clone() for buffer in buffers]
        used: set[int] = set()

        def loss_of(rows: list[Tensor]) -> Tensor:
            with FusedLayers(), _Rows(tensors, rows) as mode:
                loss = scalar_loss(closure)
            used.update(index for index in mode.used if index < len(line.parameters))
            return loss

        with isolation.rewound(), warnings.catch_warnings():
            # An operation that vmap unrolls is right all the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            losses: Tensor = torch.vmap(loss_of, randomness="same")(rows)
        return losses.detach(), frozenset(used)

    def _candidates(self, line: Line, factors: Sequence[float]) -> list[Tensor]:
        """Return the parameters of N candidates, ``[N, *shape]`` each."""
        if self._buffer is None or not self._buffer.fits(line.parameters, len(factors)):
            self._buffer = None  # the old one goes before the new one comes
            self._buffer = StackedBuffer(line.parameters, len(factors))
        stacked = [rows[: len(factors)] for rows in self._buffer.stacked]
        line.writer([parameter.detach() for parameter in line.parameters], stacked)(factors)
        return stacked


class _Rows(Substitution):
    """Puts one tensor in the place of each."""

    def __init__(self, tensors: Sequence[Tensor], rows: Sequence[Tensor]):
        super().__init__(tensors)
        self._rows = rows

    def stand_in(self, index: int) -> Tensor:
        return self._rows[index]
