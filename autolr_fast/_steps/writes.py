"""Who writes the parameters in the first steps, where AutoLR may take steps again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._machine.ranks import local
from .._optimizers import Optimizers

__all__ = ["Writes", "sample"]

_ELEMENTS = 16  # of each parameter, that stand for all
_FAR = 3.0  # times the last step: clipped weights, and a forward that normalises some, move less
_ROUNDING = 1e-3  # of the last step
_TOLD_APART = 3.0  # times as long a step


class Writes:
    """Compares samples of the parameters from where one writes them to where the next does.

    Args:
        optimizers: that write them, as AutoLR does, and nothing else should.
    """

    def __init__(self, optimizers: Optimizers):
        self._optimizers = optimizers
        self.forget()

    def forget(self) -> None:
        """Compare with nothing of before, as after a state was loaded."""
        self._left: Tensor | None = None  # by AutoLR
        self._began: Tensor | None = None  # the optimizers' step
        self._ended: Tensor | None = None
        self._length = math.inf  # of that step
        self._taken_back: tuple[Tensor, Tensor] | None = None  # where retaken steps end, and had ended

    def before_step(self) -> bool:
        """Return whether something moved them far since AutoLR left them: further than steps do."""
        left, self._began = self._left, sample(self._optimizers, _ELEMENTS)
        self._left = None
        return left is not None and _distance(left, self._began) > _FAR * self._length

    def after_step(self) -> None:
        """See where the optimizers' step ended."""
        self._ended = sample(self._optimizers, _ELEMENTS)
        if self._began is not None:
            self._length = _distance(self._began, self._ended)

    def before_probe(self) -> str:
        """Return what to tell the user of the step that is to be probed."""
        now, ended, before = sample(self._optimizers, _ELEMENTS), self._ended, self._taken_back
        self._ended, self._left, self._taken_back = now, now, None
        if ended is not None and _distance(ended, now) > _ROUNDING * self._length:
            return _BETWEEN
        if (
            before is not None
            and before[1].isfinite().all()
            and 2 * _distance(now, before[1]) < _distance(now, before[0])
        ):
            return _HIDDEN
        return ""

    def leave(self, has_retaken: bool) -> None:
        """See where AutoLR left them: where the step had ended, if no step was taken again."""
        if not has_retaken:
            return
        self._left = sample(self._optimizers, _ELEMENTS)
        if self._ended is not None and self._began is not None:
            taken, length = _distance(self._began, self._left), _distance(self._began, self._ended)
            if not length / _TOLD_APART < taken < length * _TOLD_APART:  # else the next step might end at either
                self._taken_back = self._left, self._ended
            self._length = taken


_BETWEEN = (
    "the parameters changed between optimizer.step() and scheduler.step(), and steps that AutoLR takes again undo "
    "such changes: limit or average weights after scheduler.step()"
)
_HIDDEN = (
    "the optimizer keeps copies of the weights that AutoLR does not see, and went on from them after a step was "
    "taken again: start from a learning rate near the one that AutoLR finds, or give calibration_steps=0"
)


@torch.no_grad()
def sample(optimizers: Optimizers, elements: int = 1) -> Tensor:
    """Return some elements of each parameter, evenly over it, as float64 on the CPU: a step moves nearly all."""
    flat = [local(parameter).detach().flatten() for parameter in optimizers.parameters]
    some = [each[:: max(1, each.numel() // elements)][:elements] for each in flat]
    if len({each.device for each in some}) == 1:  # one wait for the device, and not one a parameter
        return torch.cat([each.double() for each in some]).cpu()
    return torch.cat([each.double().cpu() for each in some])


def _distance(one: Tensor, other: Tensor) -> float:
    """Return how far samples are apart; 0 if parameters joined, and where numbers are not finite."""
    return float((one - other).nan_to_num(0.0, 0.0, 0.0).norm()) if one.shape == other.shape else 0.0
