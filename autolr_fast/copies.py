"""Values to go back to: copied, and put back, by one call for each device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Copies"]


class Copies:
    """What tensors hold as it is made.

    Args:
        tensors: P of them, of any shapes, dtypes and devices.

    Attributes:
        values: P copies.

    Example:
        >>> tensor = torch.ones(2)
        >>> copies = Copies([tensor])
        >>> tensor.zero_()
        tensor([0., 0.])
        >>> copies.restore()
        >>> tensor
        tensor([1., 1.])
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]):
        self.values = [torch.empty_like(tensor) for tensor in tensors]
        groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
        for tensor, value in zip(tensors, self.values, strict=True):
            # What a subclass does with many tensors at once is its own affair.
            alone = None if type(tensor) in (Tensor, nn.Parameter) else id(tensor)
            originals, values = groups.setdefault((tensor.device, tensor.dtype, alone), ([], []))
            originals.append(tensor)
            values.append(value)
        self._groups = list(groups.values())
        for originals, values in self._groups:
            _copy(originals, values)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back where they were."""
        for originals, values in self._groups:
            _copy(values, originals)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if len(sources) == 1:
        targets[0].copy_(sources[0])
    else:
        torch._foreach_copy_(targets, sources)
