"""All candidates in one stacked buffer, evaluated by one batched forward."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..candidates import Line, StackedBuffer
from ..distributed import is_sharded
from ..isolation import Closure, Isolation, scalar_loss
from .base import Evaluator, EvaluatorError
from .inplace import InPlace

__all__ = ["Stacked"]


class Stacked(Evaluator):
    """``vmap`` over stacked parameters: one batched forward for all candidates, or for a chunk of them.

    The first time a model is seen its losses at scrambled weights are compared with the in-place ones, so that
    a model that keeps its weights where ``functional_call`` does not reach is refused rather than misjudged.

    Extra memory: a preallocated buffer of N copies of the parameters (fewer if they do not fit
    ``max_memory``, or if memory runs out) and the activations of as many forwards.

    Args:
        max_memory: bytes for the buffer; by default a quarter of what is free on the parameters' device when
            the buffer is first made.

    Raises:
        ValueError: if ``max_memory`` is not a positive whole number.
    """

    def __init__(self, max_memory: int | None = None):
        if max_memory is not None and (not isinstance(max_memory, int) or max_memory <= 0):
            raise ValueError(f"max_memory={max_memory!r}: give a positive whole number of bytes, or None")
        self.max_memory = max_memory
        self._chunk: int | None = None
        self._buffer: StackedBuffer | None = None
        self._checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def name(self) -> str:
        """``"stacked"``."""
        return "stacked"

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`.

        Raises:
            EvaluatorError: if the model cannot be batched, or gives other losses then.
        """
        if model not in self._checked:
            self._check(model, line, closure)
            self._checked.add(model)
        return self._in_chunks(model, line, factors, closure)

    def state(self) -> dict[str, Any]:
        """Return the chunk size: another one may round differently."""
        return {"chunk": self._chunk}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the chunk size."""
        self._chunk = state["chunk"]

    def _check(self, model: nn.Module, line: Line, closure: Closure) -> None:
        if is_sharded(model):
            raise EvaluatorError(self.name, model, "its parameters are sharded over ranks")
        scrambled = _ScrambledLine(line)
        # In place first: what is the closure's own fault raises as itself.
        in_place = InPlace().losses(model, scrambled, (1.0, 2.0), closure)
        try:
            batched = self._in_chunks(model, scrambled, (1.0, 2.0), closure).double()
        except Exception as error:
            raise EvaluatorError(self.name, model, f"{type(error).__name__}: {error}") from error
        exact = in_place.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
            in_place.device.type
        )
        tolerance = 1e-3 if exact else 5e-2
        # No absolute tolerance: a loss may be small as a whole.
        if not torch.allclose(batched, in_place.double(), rtol=tolerance, atol=0.0, equal_nan=True):
            raise EvaluatorError(
                self.name,
                model,
                f"batched, two test losses are {batched.tolist()} and should be {in_place.tolist()}; it uses "
                "weights that torch.func.functional_call does not replace, or an operation, such as dropout inside "
                "attention, that vmap treats differently",
            )

    def _in_chunks(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        if self._chunk is None:
            self._chunk = self._affordable(line.parameters)
        losses: list[Tensor] = []
        done = 0
        with Isolation(model) as isolation:
            while done < len(factors):
                chunk = factors[done : done + self._chunk]
                try:
                    losses.append(self._batched(model, line, chunk, closure, isolation))
                except (RuntimeError, MemoryError) as error:
                    if len(chunk) == 1 or not _is_out_of_memory(error):
                        raise
                    self._chunk, self._buffer = (len(chunk) + 1) // 2, None
                else:
                    done += len(chunk)
        return torch.cat(losses)

    @torch.no_grad()
    def _batched(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure, isolation: Isolation
    ) -> Tensor:
        if self._buffer is None or not self._buffer.fits(line.parameters, len(factors)):
            self._buffer = None  # the old one goes before the new one comes
            self._buffer = StackedBuffer(line.parameters, len(factors))
        stacked = [rows[: len(factors)] for rows in self._buffer.stacked]
        line.write(factors, [parameter.detach() for parameter in line.parameters], stacked)

        evaluated = _Evaluated(model, closure)
        by_parameter = dict(zip(line.parameters, stacked, strict=True))
        tensors = {
            name: by_parameter[parameter]
            for name, parameter in evaluated.named_parameters(remove_duplicate=False)
            if parameter in by_parameter
        }
        # A module may update its buffers in the forward: each candidate has its own.
        for name, buffer in evaluated.named_buffers(remove_duplicate=False):
            tensors[name] = buffer.expand(len(factors), *buffer.shape).clone()
        # Every name of a tied parameter is given, so nothing is left to tie.
        batched = torch.vmap(
            lambda tensors: functional_call(evaluated, tensors, (), tie_weights=False), randomness="same"
        )
        with isolation.rewound(), warnings.catch_warnings():
            # An operation that vmap unrolls is right all the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            losses: Tensor = batched(tensors)
        return losses.detach()

    def _affordable(self, parameters: Sequence[Tensor]) -> int:
        one = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        budget = self.max_memory or _free_memory(parameters[0].device) // 4
        return max(1, budget // max(1, one))


class _Evaluated(nn.Module):
    """Model and closure in one module, so that ``functional_call`` reaches what the closure calls."""

    def __init__(self, model: nn.Module, closure: Closure):
        super().__init__()
        self.model = model
        self._closure = (closure,)  # in a tuple: a closure that is a module must not be registered

    def forward(self) -> Tensor:
        return scalar_loss(self._closure[0])


class _ScrambledLine:
    """Candidates unlike the live weights in place, size and mean, so that hardly a function of them stays."""

    window = 0

    def __init__(self, line: Line):
        self.parameters = line.parameters

    def write(self, factors: Sequence[float], now: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        for value, targets in zip(now, rows, strict=True):
            size = value.abs().mean().nan_to_num()  # of none: 0
            shift = torch.where(size == 0, 1.0, size)
            for factor, target in zip(factors, targets.unbind(0), strict=True):
                target.copy_(value.roll(int(factor)) * (1 + 0.3 * factor) + 0.1 * factor * shift)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)


def _free_memory(device: torch.device) -> int:
    """Return the bytes free on a device; more than there can be where that cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize
