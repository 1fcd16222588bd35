"""Candidates whose parameters exist only while the operation that uses them runs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import Line, dense_strides
from ..isolation import Closure, Isolation
from .base import Evaluator, EvaluatorError
from .inplace import InPlace
from .nearby import Nearby
from .substitution import Substitution, run_eagerly, storage_of, watch

__all__ = ["Checked", "Streamed", "check_reach", "stream"]


class Streamed(Evaluator):
    """Runs the closure once a candidate, and makes each parameter of it at every use, in scratch memory.

    The losses are bit for bit those of :class:`InPlace`, but for layers with a fused path that torch takes outside
    of torch-function modes alone (attention in eval mode, and on a GPU: to rounding). The live parameters are not
    written to.
    Extra memory: the largest operands of one operation. Time: N forwards. The first time a model is seen, or other
    parameters of it, four more forwards, one of them in place, check that it uses its parameters only through torch
    functions, and in none that changes them.
    Modules and functions compiled by ``torch.compile`` run as the Python they were made from.
    """

    def __init__(self) -> None:
        self._checked = Checked()

    @property
    def name(self) -> str:
        """``"streamed"``."""
        return "streamed"

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`.

        Raises:
            EvaluatorError: if the model's parameters cannot be replaced at their use.
        """
        if not self._checked.covers(model, line):
            check_reach(self.name, model, line, closure)
            self._checked.start(model, line)
        losses, used = stream(model, line, factors, closure)
        if self._checked.is_new(used):  # other parameters than those checked: another way through the model
            check_reach(self.name, model, line, closure)
        return losses


class Checked:
    """Which model, and which parameters of it, the reach of stand-ins was checked for."""

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._parameters: list[int] = []
        self._used: set[frozenset[int]] = set()

    def covers(self, model: nn.Module, line: Line) -> bool:
        """Whether a check was made for this model with these parameters."""
        same = self._model is not None and self._model() is model
        return same and self._parameters == [id(parameter) for parameter in line.parameters]

    def start(self, model: nn.Module, line: Line) -> None:
        """Note a check, in which any parameters may have been used."""
        self._model = weakref.ref(model)
        self._parameters = [id(parameter) for parameter in line.parameters]
        self._used = set()

    def is_new(self, used: frozenset[int]) -> bool:
        """Note which parameters a forward used; whether an earlier one since the check used others."""
        new = bool(self._used) and used not in self._used
        self._used.add(used)
        return new


@torch.no_grad()
def stream(
    model: nn.Module, line: Line, factors: Sequence[float], closure: Closure
) -> tuple[Tensor, frozenset[int]]:
    """Return the losses, [N], of a model that :func:`check_reach` found nothing against, and what they used."""
    candidate = _Candidate(line)
    losses = []
    with Isolation(model) as isolation, run_eagerly():
        for factor in factors:
            candidate.factor = factor
            losses.append(isolation.run(closure, within=candidate).detach())
    return torch.stack(losses), frozenset(candidate.used)


@torch.no_grad()
def check_reach(evaluator: str, model: nn.Module, line: Line, closure: Closure) -> list[Tensor]:
    """See that stand-ins serve: at weights nearby, the loss is that of the same weights in the model itself.

    Args:
        evaluator: its name, for the error.
        model: the module the closure calls.
        line: has the parameters.
        closure: returns the scalar loss.

    Returns:
        The buffers that the forward changes in place.

    Raises:
        EvaluatorError: if they do not.
    """
    changing = watch(evaluator, model, line, closure)
    nearby = Nearby(line)
    for factor in (1.0, 4.0):  # a loss may be too coarse to show the first
        live, streamed = stream(model, nearby, [0.0, factor], closure)[0].tolist()
        with run_eagerly():
            expected = InPlace().losses(model, nearby, [factor], closure)
        # Inside a torch-function mode some layers leave a fused path; some GPU operations add up in any order.
        tolerance = 1e-5 if expected.device.type == "cpu" else 1e-3
        if not math.isclose(streamed, expected.item(), rel_tol=tolerance):  # also where it is not finite
            raise EvaluatorError(
                evaluator,
                model,
                f"with its parameters replaced where they are used, a test loss is {streamed} and should be "
                f"{expected.item()}; it uses or changes them where no torch function is given them",
            )
        if streamed != live:
            return changing
    raise EvaluatorError(evaluator, model, "its loss does not show whether parameters can be replaced")


_PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)


class _Candidate(Substitution):
    """Makes ``line``'s parameters at ``factor``, each at its use, in memory that the next use takes again."""

    factor: float

    def __init__(self, line: Line):
        super().__init__(line.parameters)
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

    def stand_in(self, index: int) -> Tensor:
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
        """Leave the memory to what may go on using it."""
        # Autograd keeps what an operation was given.
        own = {None, *map(storage_of, self._scratch)}
        kept = torch.is_grad_enabled() or len(own) <= len(self._scratch)  # made inside vmap or grad
        pending = [result]
        while pending and not kept:
            value = pending.pop()
            if isinstance(value, (list, tuple)):
                pending += value
            elif isinstance(value, Tensor):
                kept = storage_of(value) in own
            else:
                kept = not isinstance(value, _PLAIN)
        if kept:
            self._scratch = []
