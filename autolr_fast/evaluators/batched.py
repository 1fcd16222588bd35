"""What the evaluators that run one forward for many candidates have in common."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import Line
from ..isolation import Closure, Isolation, scalar_loss
from .base import Evaluator, EvaluatorError
from .streamed import check_reach, stream
from .substitution import run_eagerly

__all__ = ["Batched"]


class Batched(Evaluator):
    """``vmap`` of the closure over candidates: all of them, or a chunk that memory allows.

    The first time a model is seen, its losses at two scrambled sets of weights are compared with those one after
    another, so that an operation that vmap treats differently is noticed.
    """

    def __init__(self) -> None:
        self._chunk: int | None = None
        # Buffers that the forward changes in place: each candidate has its own.
        self._changing: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary()

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`.

        Raises:
            EvaluatorError: if the model cannot be batched, or gives other losses then.
        """
        if model not in self._changing:
            self._changing[model] = check_reach(self.name, model, line, closure)
            try:
                self._compare(model, line, closure)
            except BaseException:
                del self._changing[model]
                raise
        return self._in_chunks(model, line, factors, closure)

    def state(self) -> dict[str, Any]:
        """Return the chunk size: another one may round differently."""
        return {"chunk": self._chunk}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the chunk size."""
        self._chunk = state["chunk"]

    @abstractmethod
    def _first_chunk(self, line: Line) -> int:
        """Return how many candidates to try at once, 1 or more."""

    @abstractmethod
    def _operands(self, line: Line, factors: Sequence[float]) -> list[Tensor]:
        """Return tensors ``[N, ...]`` that tell the candidates of N factors apart."""

    @abstractmethod
    def _substitution(
        self, line: Line, operands: Sequence[Tensor], buffers: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> AbstractContextManager[Any]:
        """Return what the closure is called in, for a candidate.

        Args:
            line: has the parameters.
            operands: one candidate's share of :meth:`_operands`.
            buffers: those that each candidate has its own of.
            rows: as many tensors to take their places.
        """

    def _release(self) -> None:
        """Free what is kept from one probe to the next."""

    def _compare(self, model: nn.Module, line: Line, closure: Closure) -> None:
        scrambled = _ScrambledLine(line)
        # One after another first: what is the closure's own fault raises as itself.
        expected = stream(model, scrambled, (1.0, 2.0), closure)
        try:
            batched = self._in_chunks(model, scrambled, (1.0, 2.0), closure).double()
        except Exception as error:
            raise EvaluatorError(self.name, model, f"{type(error).__name__}: {error}") from error
        exact = expected.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
            expected.device.type
        )
        tolerance = 1e-3 if exact else 5e-2
        # No absolute tolerance: a loss may be small as a whole.
        if not torch.allclose(batched, expected.double(), rtol=tolerance, atol=0.0, equal_nan=True):
            raise EvaluatorError(
                self.name,
                model,
                f"batched, two test losses are {batched.tolist()} and should be {expected.tolist()}; it uses an "
                "operation, such as dropout inside attention, that vmap treats differently",
            )

    def _in_chunks(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        if self._chunk is None:
            self._chunk = self._first_chunk(line)
        losses: list[Tensor] = []
        done = 0
        with Isolation(model) as isolation, run_eagerly():
            while done < len(factors):
                chunk = factors[done : done + self._chunk]
                try:
                    losses.append(self._at_once(model, line, chunk, closure, isolation))
                except (RuntimeError, MemoryError) as error:
                    if len(chunk) == 1 or not _is_out_of_memory(error):
                        raise
                    self._chunk = (len(chunk) + 1) // 2
                    self._release()
                else:
                    done += len(chunk)
        return torch.cat(losses)

    @torch.no_grad()
    def _at_once(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure, isolation: Isolation
    ) -> Tensor:
        buffers = self._changing[model]
        operands = self._operands(line, factors)
        own = [buffer.expand(len(factors), *buffer.shape).clone() for buffer in buffers]

        def loss_of(operands: list[Tensor], own: list[Tensor]) -> Tensor:
            with self._substitution(line, operands, buffers, own):
                return scalar_loss(closure)

        with isolation.rewound(), warnings.catch_warnings():
            # An operation that vmap unrolls is right all the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            losses: Tensor = torch.vmap(loss_of, randomness="same")(operands, own)
        return losses.detach()


class _ScrambledLine:
    """Candidates unlike the live weights in place, size and mean, so that hardly a function of them stays."""

    window = 0

    def __init__(self, line: Line):
        self.parameters = line.parameters

    def write(
        self,
        factors: Sequence[float],
        now: Sequence[Tensor],
        rows: Sequence[Tensor],
        indices: Sequence[int] | None = None,
    ) -> None:
        for value, targets in zip(now, rows, strict=True):
            for factor, target in zip(factors, targets.unbind(0), strict=True):
                target.copy_(value + factor * self.direction(0, value))

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        self.write([factor], [now], [out.unsqueeze(0)])

    def coefficients(self, factors: Sequence[float]) -> list[float]:
        return list(factors)

    def direction(self, index: int, now: Tensor, out: Tensor | None = None) -> Tensor:
        size = now.abs().mean().nan_to_num()  # of none: 0
        return torch.add(0.5 * now.roll(1), 0.1 * torch.where(size == 0, 1.0, size), out=out)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)
