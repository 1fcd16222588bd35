"""What modules hold: found by a walk through them, and looked through again to see whether that is still so."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import is_
from typing import Any

from torch import Tensor, nn

__all__ = ["Inventory", "cut", "inventory_of", "put_back"]

_LONG = 1000  # entries, beyond which a container of plain values is not looked into


class Inventory:
    """The containers and tensors that modules held when it was made, attributes and what is inside of them.

    A container of more than 1,000 entries, such as a vocabulary, is looked into only if its first entry is a
    tensor. Of another the length is kept.

    Args:
        modules: a model and all its submodules, or others.

    Attributes:
        modules: as given.
        parameters: of the modules, each once.
        tensors: buffers and others, each once.
        is_plain: whether they hold no tensors but parameters and buffers: others may be large, and soon replaced.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> inventory = Inventory([model])
        >>> inventory.is_current()
        True
        >>> model.scale = 2.0
        >>> inventory.is_current()
        False
        >>> inventory.put_back()
        >>> hasattr(model, "scale")
        False
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules
        content = _Content()
        for module in modules:
            content.add(module)
        self.parameters = list(content.parameters.values())
        self.tensors = list(content.tensors.values())
        self._children = [module._modules.values() for module in modules]
        self._known_children = list(chain.from_iterable(self._children))
        self._containers = content.containers
        self._views = [live.values() for live in self._containers if isinstance(live, dict)]
        self._long = [(live, len(live)) for live in content.long]
        self._held = list(map(len, self._containers)), list(self._keys()), list(self._dict_values())
        self._is_scripted = content.is_scripted
        self.is_plain = content.is_plain

    def is_current(self) -> bool:
        """Whether all is as it was: no module, parameter, tensor or other attribute came, went or was replaced.

        That of scripted modules is nothing that Python can see.
        """
        if self._is_scripted or any(len(live) != length for live, length in self._long):
            return False
        children = list(chain.from_iterable(self._children))
        known = self._known_children
        return len(children) == len(known) and all(map(is_, children, known)) and self._hold_the_same()

    def put_back(self) -> None:
        """Have all containers hold what they held."""
        if not self._hold_the_same():
            lengths, *held = self._held
            keys, values = map(iter, held)
            for live, length in zip(self._containers, lengths, strict=True):
                saved: Any = list(islice(keys, length))
                if isinstance(live, dict):
                    saved = dict(zip(saved, islice(values, length), strict=True))
                put_back(live, saved)
        for long, length in self._long:
            cut(long, length)

    def _hold_the_same(self) -> bool:
        """Whether all containers hold the very objects that they held, as nearly always: in one pass, for speed."""
        lengths, keys, values = self._held
        return (
            list(map(len, self._containers)) == lengths
            and all(map(is_, self._keys(), keys))
            and all(map(is_, self._dict_values(), values))
        )

    def _keys(self) -> Iterator[Any]:
        """Return the keys of the dicts, and what the others contain."""
        return chain.from_iterable(self._containers)

    def _dict_values(self) -> Iterator[Any]:
        return chain.from_iterable(self._views)


def inventory_of(model: nn.Module, known: Inventory | None = None) -> Inventory:
    """Return what a model holds: the inventory that is known, if it is that of the model as it is now."""
    if known is not None and known.modules[0] is model and known.is_current():
        return known
    return Inventory(list(model.modules()))


_TORCHS_OWN = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})  # what most attributes are


class _Content:
    """What a closure could change in modules: containers, those inside of them, and their tensors.

    Attributes:
        containers: that are looked into.
        long: that are not.
        parameters: by id; those that modules register.
        tensors: by id; others.
        is_plain: whether all tensors are parameters and buffers, and no other containers hold anything.
        is_scripted: whether the registers of a module are no dicts.
    """

    def __init__(self) -> None:
        self.containers: list[Any] = []
        self.long: list[Any] = []
        self.parameters: dict[int, nn.Parameter] = {}
        self.tensors: dict[int, Tensor] = {}
        self.is_plain = True
        self.is_scripted = False

    def add(self, module: nn.Module) -> None:
        attributes = vars(module)
        self.containers.append(attributes)
        for registered in (module._parameters, module._buffers):
            if isinstance(registered, dict):
                self.containers.append(registered)
            else:
                self.is_scripted, self.is_plain = True, False
        for parameter in module._parameters.values():
            if parameter is not None:
                self.parameters[id(parameter)] = parameter
        self._collect(module._buffers.values())
        own = [value for name, value in attributes.items() if type(value) not in _PLAIN and name not in _TORCHS_OWN]
        if own:
            before = self._count()
            self._collect(own)
            self.is_plain &= self._count() == before

    def _count(self) -> int:
        return len(self.containers) + len(self.long) + len(self.tensors)

    def _collect(self, values: Iterable[Any], depth: int = 4) -> None:
        for value in values:
            if type(value) in _PLAIN:
                continue
            inside: Collection[Any] | None = None
            if isinstance(value, Tensor):
                # Parameters are kept elsewhere.
                if type(value) is Tensor or not isinstance(value, nn.Parameter):
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
