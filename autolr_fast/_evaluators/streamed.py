"""Candidates whose parameters exist only while the operation that uses them runs."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._isolation import Closure, Isolation
from .._machine.memory import SMALL, is_out_of_memory
from .._ops.buffer import dense_strides
from .._steps import Line
from .base import Evaluator, EvaluatorError
from .inplace import InPlace, rewritten
from .nearby import Nearby
from .substitution import Substitution, run_eagerly, storage_of
from .watch import Forward, watch

__all__ = ["Checked", "Streamed", "check_reach"]


class Streamed(Evaluator):
    """Runs the closure once a candidate, and makes each parameter at every use, in scratch memory.

    Choose ``evaluator="streamed"`` for large models whose parameters go through torch functions. The live
    parameters are not written to. The extra memory is the largest operands of one operation. The time is N
    forwards.

    The losses are bit for bit those of `InPlace`. They agree to rounding for layers with a fused path that torch
    takes outside of torch-function modes alone. Such is attention in eval mode, and on a GPU.

    Three more forwards check the model the first time it is seen, or other parameters of it. One of the three is in
    place. The check sees that the model uses its parameters only through torch functions, and in none that changes
    them. Modules and functions compiled by ``torch.compile`` run as the Python they were made from.

    Examples:
        >>> from autolr_fast import AutoLR
        >>> model = nn.Linear(4, 1)
        >>> AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), model, evaluator=Streamed()).evaluator.name
        'streamed'
    """

    name = "streamed"

    def __init__(self) -> None:
        self._checked = Checked()

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`.

        Raises:
            EvaluatorError: if the model's parameters cannot be replaced at their use.
        """
        return self._checked.losses(
            model,
            line,
            check=lambda: check_reach(self.name, model, line, closure),
            evaluate=lambda: _stream(model, line, factors, closure),
            in_place=lambda: InPlace().losses(model, line, factors, closure),
        )


class Checked:
    """Losses of models whose parameters can be replaced where they are used, as a check has shown before."""

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._parameters: list[int] = []
        self._used: set[frozenset[int]] = set()

    def losses(
        self,
        model: nn.Module,
        line: Line,
        check: Callable[[], object],
        evaluate: Callable[[], tuple[Tensor, frozenset[int]]],
        in_place: Callable[[], Tensor],
    ) -> Tensor:
        """Return the losses, [N].

        Args:
            model: the module the closure calls.
            line: has the parameters.
            check: called once for a model with these parameters, and where a forward used others of them.
            evaluate: returns the losses, and the indices of the parameters that were used.
            in_place: returns the losses where no check is possible yet: of a batch whose loss is not finite.
        """
        parameters = [id(parameter) for parameter in line.parameters]
        if self._model is None or self._model() is not model or self._parameters != parameters:
            try:
                check()
            except NotFiniteError:
                if not self._check_where_it_began(line, check):
                    return in_place()
            self._model, self._parameters, self._used = weakref.ref(model), parameters, set()
        try:
            losses, used = evaluate()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                check()  # says more, if the closure is of another kind than the one that was checked
            raise
        if self._used and used not in self._used:  # another way through the model than the one that was checked
            check()
        self._used.add(used)
        return losses

    @staticmethod
    def _check_where_it_began(line: Line, check: Callable[[], object]) -> bool:
        """Check before a step that was far too long, where the loss may show more; return whether it did."""
        with torch.no_grad(), rewritten(line.parameters) as (now, rows):
            line.writer(now.values, rows)([0.0])
            try:
                check()
            except NotFiniteError:
                return False
        return True


class NotFiniteError(EvaluatorError):
    """The loss is not finite where it was to show whether the evaluator serves."""


@torch.no_grad()
def _stream(
    model: nn.Module, line: Line, factors: Sequence[float], closure: Closure
) -> tuple[Tensor, frozenset[int]]:
    """Return the losses, [N], of a model that :func:`check_reach` found nothing against, and what they used."""
    candidate = _Candidate(line)
    losses = []
    with Isolation(model, closure) as isolation, run_eagerly():
        for factor in factors:
            candidate.factor = factor
            losses.append(isolation.run(closure, within=candidate).detach())
    return torch.stack(losses), frozenset(candidate.used)


@torch.no_grad()
def check_reach(evaluator: str, model: nn.Module, line: Line, closure: Closure) -> Forward:
    """See that stand-ins serve: at weights nearby, the loss is that of the same weights in the model itself.

    Large models are written to a part at a time, beside stand-ins for the other parameters: no copy of all is made.

    Args:
        evaluator: its name, for the error.
        model: the module the closure calls.
        line: has the parameters.
        closure: returns the scalar loss.

    Returns:
        What the forward does, with the losses at the weights nearby.

    Raises:
        EvaluatorError: if they do not.
    """
    forward = watch(evaluator, model, line, closure)
    live = forward.losses[0.0]
    for factor in (1.0, 4.0):  # a loss may be too coarse to show the first
        streamed = _stream(model, Nearby(line.parameters), [factor], closure)[0].item()
        for part in _parts(line.parameters):
            loss = _loss_nearby(model, line, part, factor, closure)
            expected = loss.item()
            if not math.isfinite(live + expected):
                cause = f"its loss is not finite, {live} at its weights and {expected} near them, and shows nothing"
                raise NotFiniteError(evaluator, model, cause)
            # Inside a torch-function mode some layers leave a fused path; some GPU operations add up in any order.
            if not math.isclose(streamed, expected, rel_tol=1e-5 if loss.device.type == "cpu" else 1e-3):
                cause = (
                    f"with its parameters replaced where they are used, a test loss is {streamed} and should be "
                    f"{expected}; it uses or changes them where no torch function is given them"
                )
                raise EvaluatorError(evaluator, model, cause)
        forward.losses[factor] = streamed
        if streamed != live:
            return forward
    raise EvaluatorError(evaluator, model, "its loss does not show whether parameters can be replaced")


def _parts(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters in parts of 16 MiB, or a quarter of all if that is more: little to copy."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in parameters]
    most = max(SMALL, sum(sizes) // 4)
    parts: list[list[nn.Parameter]] = []
    left = 0
    for parameter, size in zip(parameters, sizes, strict=True):
        if not parts or size > left:
            parts.append([])
            left = most
        parts[-1].append(parameter)
        left -= size
    return parts


def _loss_nearby(
    model: nn.Module, line: Line, part: Sequence[nn.Parameter], factor: float, closure: Closure
) -> Tensor:
    """Return the loss at weights nearby: a part of them in the model itself, the others where they are used."""
    written = set(part)
    others = _Candidate(Nearby([parameter for parameter in line.parameters if parameter not in written]))
    others.factor = factor
    with rewritten(part) as (now, rows), Isolation(model, closure) as isolation, run_eagerly():
        Nearby(part).writer(now.values, rows)([factor])
        return isolation.run(closure, within=others)


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
        results = result if isinstance(result, tuple) else (result,)
        own = {None, *map(storage_of, self._scratch)}  # None: made inside vmap or grad
        is_fresh = all(isinstance(value, Tensor) and storage_of(value) not in own for value in results)
        if torch.is_grad_enabled() or not is_fresh:  # autograd keeps what an operation was given
            self._scratch = []
