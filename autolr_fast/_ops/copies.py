"""Values to go back to: copied, and put back, by one call for each device and dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Copies"]

_BATCHED = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool}
)


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

    def __init__(self, tensors: Sequence[Tensor]):
        self.values: list[Tensor] = []
        self._alone: list[tuple[Tensor, Tensor]] = []
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]
        groups = defaultdict(lambda: ([], []))
        for tensor in tensors:
            if _can_be_batched(tensor):
                value = torch.empty_like(tensor)
                originals, values = groups[tensor.device, tensor.dtype]
                originals.append(tensor)
                values.append(value)
            else:
                value = tensor.detach().clone()
                self._alone.append((tensor, value))
            self.values.append(value)
        self._groups = list(groups.values())
        if not self._groups:
            return
        with torch.no_grad():
            for originals, values in self._groups:
                torch._foreach_copy_(values, originals)

    def restore(self) -> None:
        """Put the values back where they were."""
        if not self.values:
            return
        with torch.no_grad():
            for originals, values in self._groups:
                torch._foreach_copy_(originals, values)
            for original, value in self._alone:
                original.copy_(value)


def _can_be_batched(tensor: Tensor) -> bool:
    """Whether torch copies many like it by one call, on any device."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _BATCHED
    return plain and not tensor.is_neg()
