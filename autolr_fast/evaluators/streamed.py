"""Candidates whose parameters exist only while the operation that uses them runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import Line, dense_strides
from ..isolation import Closure, Isolation
from .base import Evaluator
from .substitution import Substitution, check_reach, run_eagerly

__all__ = ["Streamed"]


class Streamed(Evaluator):
    """Runs the closure once a candidate, and makes each parameter of it at every use, in scratch memory.

    The losses are bit for bit those of :class:`InPlace`. The live parameters are not written to. Extra memory:
    the largest operands of one operation. Time: N forwards. The first time a model is seen, one more forward
    checks that it uses its parameters only through torch functions, and in none that changes them; modules and
    functions compiled by ``torch.compile`` run as the Python they were made from.
    """

    def __init__(self) -> None:
        self._checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def name(self) -> str:
        """``"streamed"``."""
        return "streamed"

    @torch.no_grad()
    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`.

        Raises:
            EvaluatorError: if the model's parameters cannot be replaced at their use.
        """
        if model not in self._checked:
            check_reach(self.name, model, line, closure)
            self._checked.add(model)
        candidate = _Candidate(line)
        losses = []
        with Isolation(model) as isolation, run_eagerly():
            for factor in factors:
                candidate.factor = factor
                losses.append(isolation.run(closure, within=candidate).detach())
        return torch.stack(losses)


class _Candidate(Substitution):
    """Makes ``line``'s parameters at ``factor``, each at its use, in memory that the next use takes again."""

    factor: float

    def __init__(self, line: Line):
        super().__init__(line.parameters, self._make)
        self._line = line
        self._now = [parameter.detach() for parameter in line.parameters]
        self._scratch: list[Tensor] = []  # flat bytes, one a tensor of the operation under way
        self._used = 0

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._used = 0
        result = super().call(func, args, kwargs)
        if self._used:
            self._give_away(result)
        return result

    def _make(self, index: int) -> Tensor:
        now = self._now[index]
        row = self._memory(now.numel() * now.element_size(), now.device).view(now.dtype)
        candidate = row.as_strided(now.shape, dense_strides(now))
        self._line.write_one(self.factor, now, candidate, index)
        return candidate

    def _memory(self, size: int, device: torch.device) -> Tensor:
        slot = self._used
        self._used += 1
        if slot == len(self._scratch):
            self._scratch.append(torch.empty(0, dtype=torch.uint8))
        if len(self._scratch[slot]) < size or self._scratch[slot].device != device:
            self._scratch[slot] = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._scratch[slot] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._scratch[slot][:size]

    def _give_away(self, result: Any) -> None:
        """Leave to a result the memory that it is a view of."""
        pending = [result]
        while pending:
            value = pending.pop()
            if isinstance(value, (list, tuple)):
                pending += value
            elif isinstance(value, Tensor) and value.layout == torch.strided:
                memory = value.untyped_storage().data_ptr()
                for slot, scratch in enumerate(self._scratch):
                    if scratch.untyped_storage().data_ptr() == memory:
                        self._scratch[slot] = torch.empty(0, dtype=torch.uint8)
