"""What modules hold, and how it is put back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from .._ops.copies import Copies

__all__ = ["ModuleStates"]


class ModuleStates:
    """What the modules of a model held when it was made: attributes, also in containers, and values of tensors.

    Args:
        modules: a model and all its submodules.
    """

    @torch.no_grad()
    def __init__(self, modules: Sequence[nn.Module]):
        containers: list[Any] = []
        tensors: dict[int, Tensor] = {}
        for module in modules:
            attributes = vars(module)
            containers.append(attributes)
            if isinstance(module._parameters, dict):  # that of a scripted module is none
                containers.append(module._parameters)
            own = [value for name, value in attributes.items() if name not in _TORCHS_OWN]
            _collect([module._buffers, *own], containers, tensors)
        self._containers = containers
        self._copies = [copy.copy(live) for live in containers]
        self._dicts = [live for live in containers if isinstance(live, dict)]
        self._held = self._lengths(), list(self._keys()), list(self._dict_values())
        self._parameters = [
            (parameter, parameter.requires_grad, parameter.data_ptr(), parameter.data)
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        self._values = Copies(list(tensors.values()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        if not self._hold_the_same():
            for live, saved in zip(self._containers, self._copies, strict=True):
                if not _holds_the_same(live, saved):
                    live.clear()
                    live.extend(saved) if isinstance(live, (list, deque)) else live.update(saved)
        for parameter, flag, address, data in self._parameters:
            if parameter.data_ptr() != address:
                parameter.data = data
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        self._values.restore()

    def _hold_the_same(self) -> bool:
        """Whether all containers hold the very objects that they held, as nearly always: in one pass, for speed."""
        lengths, keys, values = self._held
        return (
            self._lengths() == lengths
            and all(map(is_, self._keys(), keys))
            and all(map(is_, self._dict_values(), values))
        )

    def _lengths(self) -> list[int]:
        return list(map(len, self._containers))

    def _keys(self) -> Iterator[Any]:
        """Return the keys of the dicts, and what the others contain."""
        return chain.from_iterable(self._containers)

    def _dict_values(self) -> Iterator[Any]:
        return chain.from_iterable(map(methodcaller("values"), self._dicts))


_TORCHS_OWN = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})  # what most attributes are


def _collect(values: Iterable[Any], containers: list[Any], tensors: dict[int, Tensor], depth: int = 4) -> None:
    """Add what a closure could change in place: containers, those inside of them, and their tensors."""
    for value in values:
        if type(value) in _PLAIN:
            continue
        inside: Iterable[Any] | None = None
        if isinstance(value, Tensor):
            if _is_writable(value):
                tensors[id(value)] = value
        elif isinstance(value, (dict, list, deque, set)):
            containers.append(value)
            inside = value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            inside = value
        elif type(value).__name__ == "OrderedDictWrapper":  # the dicts of a scripted module are none
            inside = value.values()
        if depth and inside is not None:
            _collect(inside, containers, tensors, depth - 1)


def _holds_the_same(live: Any, saved: Any) -> bool:
    """Whether a container holds the very objects that its copy holds."""
    if len(live) != len(saved):
        return False
    if isinstance(live, set):
        return set(map(id, live)) == set(map(id, saved))
    same = all(map(is_, live, saved))
    return same and (not isinstance(live, dict) or all(map(is_, live.values(), saved.values())))


def _is_writable(tensor: Tensor) -> bool:
    """Whether in-place operations take the tensor; one that they refuse does not change."""
    if (
        type(tensor) is not Tensor and isinstance(tensor, nn.Parameter)
    ) or tensor.layout != torch.strided:  # parameters are kept elsewhere
        return False
    strides = tensor.stride()
    expanded = 0 in strides and any(s == 0 and size > 1 for s, size in zip(strides, tensor.shape, strict=True))
    return not expanded and not tensor.is_inference()
