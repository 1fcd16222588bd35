"""What the evaluators that run one forward for many candidates have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import Line
from ..isolation import Closure, Isolation, scalar_loss
from ..layers import FusedLayers
from ..memory import is_out_of_memory
from .base import Evaluator, EvaluatorError
from .nearby import Nearby
from .streamed import Checked, check_reach, stream
from .substitution import Substitution, run_eagerly

__all__ = ["Batched"]


class Batched(Evaluator):
    """``vmap`` of the closure over candidates: all of them, or a chunk that memory allows.

    The first time a model is seen, or other parameters of it, its losses at two sets of weights nearby are compared
    with those one after another, so that an operation that vmap treats differently is noticed.
    """

    def __init__(self) -> None:
        self._chunk: int | None = None
        self._checked = Checked()
        self._changing: list[str] = []  # names of buffers that the forward changes: each candidate has its own

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`.

        Raises:
            EvaluatorError: if the model cannot be batched, or gives other losses then.
        """
        if not self._checked.covers(model, line):
            self._check(model, line, closure)
            self._checked.start(model, line)
        losses, used = self._in_chunks(model, line, factors, closure)
        if self._checked.is_new(used):  # other parameters than those checked: another way through the model
            self._check(model, line, closure)
        return losses

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
    ) -> Substitution:
        """Return what the closure is called in, for a candidate.

        Args:
            line: has the parameters.
            operands: one candidate's share of :meth:`_operands`.
            buffers: those that each candidate has its own of.
            rows: as many tensors to take their places.
        """

    def _release(self) -> None:
        """Free what is kept from one probe to the next."""

    def _check(self, model: nn.Module, line: Line, closure: Closure) -> None:
        # One after another first: what is the closure's own fault raises as itself.
        changing = {id(buffer) for buffer in check_reach(self.name, model, line, closure)}
        self._changing = [name for name, buffer in model.named_buffers() if id(buffer) in changing]
        nearby = Nearby(line)
        expected, _ = stream(model, nearby, (1.0, 2.0), closure)
        try:
            batched = self._in_chunks(model, nearby, (1.0, 2.0), closure)[0].double()
        except Exception as error:
            raise EvaluatorError(self.name, model, f"{type(error).__name__}: {error}") from error
        exact = expected.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
            expected.device.type
        )
        tolerance = 1e-3 if exact else 5e-2
        # No absolute tolerance: a loss may be small as a whole.
        if not torch.allclose(batched, expected.double(), rtol=tolerance, atol=0.0):
            raise EvaluatorError(
                self.name,
                model,
                f"batched, two test losses are {batched.tolist()} and should be {expected.tolist()}; it uses an "
                "operation, such as dropout inside attention, that vmap treats differently",
            )

    def _in_chunks(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure
    ) -> tuple[Tensor, frozenset[int]]:
        if self._chunk is None:
            self._chunk = self._first_chunk(line)
        losses: list[Tensor] = []
        used: frozenset[int] = frozenset()
        done = 0
        with Isolation(model) as isolation, run_eagerly():
            while done < len(factors):
                chunk = factors[done : done + self._chunk]
                try:
                    chunk_losses, used = self._at_once(model, line, chunk, closure, isolation)
                    losses.append(chunk_losses)
                except (RuntimeError, MemoryError) as error:
                    if len(chunk) == 1 or not is_out_of_memory(error):
                        raise
                    self._chunk = (len(chunk) + 1) // 2
                    self._release()
                else:
                    done += len(chunk)
        return torch.cat(losses), used

    @torch.no_grad()
    def _at_once(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure, isolation: Isolation
    ) -> tuple[Tensor, frozenset[int]]:
        buffers = [model.get_buffer(name) for name in self._changing]
        used: set[int] = set()
        operands = self._operands(line, factors)
        own = [buffer.expand(len(factors), *buffer.shape).clone() for buffer in buffers]

        def loss_of(operands: list[Tensor], own: list[Tensor]) -> Tensor:
            with FusedLayers(), self._substitution(line, operands, buffers, own) as mode:
                loss = scalar_loss(closure)
            used.update(index for index in mode.used if index < len(line.parameters))
            return loss

        with isolation.rewound(), warnings.catch_warnings():
            # An operation that vmap unrolls is right all the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            losses: Tensor = torch.vmap(loss_of, randomness="same")(operands, own)
        return losses.detach(), frozenset(used)
