"""Weights near the live ones, to test with: far enough for a loss to show which are used, in the same domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._ops import Writer

__all__ = ["Nearby", "nearby_step"]


class Nearby:
    """A :class:`~autolr_fast._steps.Line` whose steps change each element by some per cent, and no sign.

    Args:
        parameters: whose elements they change.
    """

    window = 0

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> Writer:
        """Return what writes ``now + f * step``; see :class:`~autolr_fast._steps.Line`."""

        def write(factors: Sequence[float]) -> None:
            for index, (value, targets) in enumerate(zip(now, rows, strict=True)):
                for factor, target in zip(factors, targets.unbind(0), strict=True):
                    self.write_one(factor, value, target, index)

        return write

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter; see :class:`~autolr_fast._steps.Line`."""
        torch.add(now, nearby_step(now), alpha=factor, out=out)


def nearby_step(now: Tensor) -> Tensor:
    """Return up to 10 % of each element, in a wave over them, and a hundredth for what is next to zero.

    A head that began at zero, one short step later, would hide a tenth of all that is before it.
    """
    # In place, and without integers for each element: a large parameter is moved beside full memory.
    pattern = torch.arange(-8, 9, device=now.device).to(now.dtype).mul_(0.0125).add_(0.006)
    wave = pattern.repeat(now.numel() // 17 + 1)[: now.numel()].view(now.shape)
    step = now.abs().mul_(wave)
    small = now.abs() < 1e-4
    step.masked_fill_(small, 0.01).masked_fill_(small.logical_and_(now < 0), -0.01)
    # What is as large as a mask stays.
    return step.masked_fill_((now.abs() < torch.finfo(now.dtype).max / 4).logical_not_(), 0.0)
