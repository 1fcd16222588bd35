"""Weights near the live ones, to test with: far enough for a loss to show which are used, in the same domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..candidates import Line
from ..ops import Writer

__all__ = ["Nearby", "nearby_step"]


class Nearby:
    """A :class:`~autolr_fast.candidates.Line` whose steps change each element by some per cent, and no sign.

    Args:
        line: has the parameters.
    """

    window = 0

    def __init__(self, line: Line):
        self.parameters = line.parameters

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> Writer:
        """Return what writes ``now + f * step``; see :class:`~autolr_fast.candidates.Line`."""

        def write(factors: Sequence[float]) -> None:
            for value, targets in zip(now, rows, strict=True):
                step = nearby_step(value)
                for factor, target in zip(factors, targets.unbind(0), strict=True):
                    torch.add(value, step, alpha=factor, out=target)

        return write

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter; see :class:`~autolr_fast.candidates.Line`."""
        torch.add(now, nearby_step(now), alpha=factor, out=out)

    def coefficients(self, factors: Sequence[float]) -> list[float]:
        """Return the factors; see :class:`~autolr_fast.candidates.Line`."""
        return list(factors)

    def direction(self, index: int, now: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the step; see :class:`~autolr_fast.candidates.Line`."""
        return nearby_step(now) if out is None else out.copy_(nearby_step(now))


def nearby_step(now: Tensor) -> Tensor:
    """Return up to 10 % of each element, in a wave over them, and a hundredth for what is next to zero.

    A head that began at zero, one short step later, would hide a tenth of all that is before it.
    """
    wave = torch.arange(now.numel(), device=now.device).remainder_(17).sub_(8).to(now.dtype).view(now.shape)
    hundredth = torch.where(now < 0, -0.01, 0.01)
    step = torch.where(now.abs() < 1e-4, hundredth, now.abs() * (0.0125 * wave + 0.006))
    # What is as large as a mask stays.
    return torch.where(now.abs() < torch.finfo(now.dtype).max / 4, step, 0.0).to(now.dtype)
