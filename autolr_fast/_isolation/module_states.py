"""What modules hold, and how it is put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._ops.copies import Copies
from .inventory import Inventory

__all__ = ["ModuleStates", "tensors_of"]


class ModuleStates:
    """What the modules of a model held when it was made: attributes, also in containers, and values of tensors.

    Of a container of more than 1,000 entries the length is kept: what was appended to a list, or came new into a
    dict, is removed. A long set keeps what was added. See :class:`Inventory`.

    Args:
        modules: a model and all its submodules, or what they hold, if that is known.
    """

    def __init__(self, modules: Sequence[nn.Module] | Inventory):
        self._inventory = inventory = modules if isinstance(modules, Inventory) else Inventory(modules)
        self._parameters = [
            (parameter, parameter.requires_grad, parameter.data_ptr(), parameter.data)
            for parameter in inventory.parameters
        ]
        self._values = Copies(list(filter(_is_writable, inventory.tensors)))

    def restore(self) -> None:
        """Put them back."""
        self._inventory.put_back()
        for parameter, flag, address, data in self._parameters:
            if parameter.data_ptr() != address:
                parameter.data = data
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        self._values.restore()


def tensors_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the tensors of modules: parameters, buffers, and others that can be written to."""
    inventory = Inventory(modules)
    return [*inventory.parameters, *filter(_is_writable, inventory.tensors)]


def _is_writable(tensor: Tensor) -> bool:
    """Whether in-place operations take the tensor; one that they refuse does not change."""
    if tensor.layout != torch.strided:
        return False
    strides = tensor.stride()
    expanded = 0 in strides and any(s == 0 and size > 1 for s, size in zip(strides, tensor.shape, strict=True))
    return not expanded and not tensor.is_inference()
