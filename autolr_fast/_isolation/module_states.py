"""What modules hold, and how it is put back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from .._ops.copies import Copies

__all__ = ["ModuleStates", "cut", "put_back", "tensors_of"]

_LONG = 1000  # entries, beyond which a container of plain values is not looked into


class ModuleStates:
    """What the modules of a model held when it was made: attributes, also in containers, and values of tensors.

    A container of more than 1,000 entries, such as a vocabulary, is looked into only if its first entry is a
    tensor. Of another the length is kept: what was appended to a list, or came new into a dict, is removed. A long
    set keeps what was added.

    Args:
        modules: a model and all its submodules.
    """

    @torch.no_grad()
    def __init__(self, modules: Sequence[nn.Module]):
        content = _Content()
        for module in modules:
            content.add(module)
        self._containers = containers = content.containers
        self._long = [(live, len(live)) for live in content.long]
        self._copies = [copy.copy(live) for live in containers]
        self._dicts = [live for live in containers if isinstance(live, dict)]
        self._held = self._lengths(), list(self._keys()), list(self._dict_values())
        self._parameters = [
            (parameter, parameter.requires_grad, parameter.data_ptr(), parameter.data)
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        self._values = Copies(list(content.tensors.values()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        if not self._hold_the_same():
            for live, saved in zip(self._containers, self._copies, strict=True):
                put_back(live, saved)
        for long, length in self._long:
            cut(long, length)
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


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the tensors of modules: parameters, buffers, and others that can be written to."""
    content = _Content()
    parameters: list[Tensor] = []
    for module in modules:
        content.add(module)
        parameters += [parameter for parameter in module._parameters.values() if parameter is not None]
    return parameters + list(content.tensors.values())


_TORCHS_OWN = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})  # what most attributes are


class _Content:
    """What a closure could change in modules: containers, those inside of them, and their tensors.

    Attributes:
        containers: that are looked into.
        long: that are not.
        tensors: by id.
    """

    def __init__(self) -> None:
        self.containers: list[Any] = []
        self.long: list[Any] = []
        self.tensors: dict[int, Tensor] = {}

    def add(self, module: nn.Module) -> None:
        attributes = vars(module)
        self.containers.append(attributes)
        if isinstance(module._parameters, dict):  # that of a scripted module is none
            self.containers.append(module._parameters)
        if isinstance(module._buffers, dict):
            self.containers.append(module._buffers)
        self._collect(module._buffers.values())
        self._collect(value for name, value in attributes.items() if name not in _TORCHS_OWN)

    def _collect(self, values: Iterable[Any], depth: int = 4) -> None:
        for value in values:
            if type(value) in _PLAIN:
                continue
            inside: Collection[Any] | None = None
            if isinstance(value, Tensor):
                if _is_writable(value):
                    self.tensors[id(value)] = value
            elif isinstance(value, (dict, list, deque, set, tuple)):
                inside = value.values() if isinstance(value, dict) else value
            elif type(value).__name__ == "OrderedDictWrapper":  # the dicts of a scripted module are none
                inside = value.values()
            if inside is None:
                continue
            is_long = len(inside) > _LONG and not isinstance(next(iter(inside)), Tensor)
            if isinstance(value, (dict, list, deque, set)):
                (self.long if is_long else self.containers).append(value)
            if depth and not is_long:
                self._collect(inside, depth - 1)


def put_back(live: Any, saved: Any) -> None:
    """Fill a container with what its copy holds, if it holds anything else."""
    if not _holds_the_same(live, saved):
        live.clear()
        live.extend(saved) if isinstance(live, (list, deque)) else live.update(saved)


def cut(grown: Any, length: int) -> None:
    """Remove what was added last to a list, dict or deque that had so many entries."""
    if isinstance(grown, list):
        del grown[length:]
    elif isinstance(grown, dict):
        for _ in range(len(grown) - length):
            grown.popitem()
    elif isinstance(grown, deque):
        for _ in range(len(grown) - length):
            grown.pop()


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
