"""Other weights to test a model with, from which the live ones come back bit for bit without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..candidates import Line

__all__ = ["Shuffled"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Shuffled:
    """A :class:`~autolr_fast.candidates.Line` of one candidate: each parameter rolled by one element.

    Besides, every other one is doubled and the others negated, which changes no bits but exponents and signs; one
    whose elements are all alike gets another value.
    """

    window = 0

    def __init__(self, line: Line):
        self.parameters = line.parameters
        self._constants = [_constant(parameter.detach()) for parameter in line.parameters]
        self._applied = 0

    def write(
        self,
        factors: Sequence[float],
        now: Sequence[Tensor],
        rows: Sequence[Tensor],
        indices: Sequence[int] | None = None,
    ) -> None:
        """Write the candidate, whatever the factors."""
        for index, value, row in zip(indices or range(len(now)), now, rows, strict=True):
            row.copy_(self._shuffle(index, value))

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter of it."""
        out.copy_(self._shuffle(index, now))

    def coefficients(self, factors: Sequence[float]) -> list[float]:
        """Return 1 for each factor."""
        return [1.0] * len(factors)

    def direction(self, index: int, now: Tensor, out: Tensor | None = None) -> Tensor:
        """Return how far a parameter is from its live value."""
        return torch.sub(self._shuffle(index, now), now, out=out)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the candidate into the live parameters."""
        for index, parameter in enumerate(self.parameters):
            live = parameter.detach()
            live.copy_(self._shuffle(index, live))
            self._applied = index + 1

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what was there; nothing to do if the candidate was not applied."""
        for index in range(self._applied):
            live, constant = self.parameters[index].detach(), self._constants[index]
            if constant is not None:
                live.fill_(constant)
            else:
                live.copy_((live * 0.5 if index % 2 else -live).roll(-1))
        self._applied = 0

    def _shuffle(self, index: int, value: Tensor) -> Tensor:
        if self._constants[index] is not None:
            return value + 0.5
        rolled = value.roll(1)
        return rolled.mul_(2) if index % 2 else rolled.neg_()


def _constant(value: Tensor) -> Tensor | None:
    """Return the element that all others equal bit for bit, if there is one."""
    if not value.numel():
        return None
    bits = value.view(_BITS[value.element_size()])
    first = (0,) * value.dim()
    return value[first].clone() if bool((bits == bits[first]).all()) else None
