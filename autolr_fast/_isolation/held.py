"""What a closure can reach: modules, which are put back, and tensors, which it may not change."""

from __future__ import annotations

import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .binding import content_of, names_in
from .closures import ClosureError
from .module_states import tensors_of

__all__ = ["Held", "Versions", "held_by", "modules_beside"]

_MOST = 1000  # entries that are looked at
_DEEPEST = 8  # functions and containers one inside the other


class Held(NamedTuple):
    """What a closure can reach.

    Attributes:
        modules: each once; those inside of them are not listed.
        tensors: what a user calls each -> the tensor; none that only modules hold.
    """

    modules: Sequence[nn.Module] = ()
    tensors: Sequence[tuple[str, Tensor]] = ()


def held_by(closure: Callable[..., Any]) -> Held:
    """Find the modules and tensors that a closure can reach by its variables.

    These are its free variables, the global ones it names, defaults, the parts of a ``functools.partial``, and the
    object of a bound method. Functions of the user's are followed, containers opened, and of other objects the
    attributes. About 1,000 entries are looked at, and none of a container that has more: a data set is no batch.

    Args:
        closure: as of :meth:`autolr_fast.AutoLR.loss`.

    Example:
        >>> batch, model = {"input": torch.zeros(2)}, nn.Linear(2, 1)
        >>> held = held_by(lambda: model(batch["input"]).sum())
        >>> [name for name, _ in held.tensors], held.modules
        (["batch['input']"], [Linear(in_features=2, out_features=1, bias=True)])
    """
    modules: list[nn.Module] = []
    tensors: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    left = _MOST
    # Breadth first: what is nearest counts most if there is too much.
    found = deque([_Entry("", closure)])
    while found and left:
        entry = found.popleft()
        if id(entry.value) in seen:
            continue
        seen.add(id(entry.value))  # alive as long as the closure is
        try:
            if isinstance(entry.value, Tensor):
                tensors.append((entry.name, entry.value))
            elif isinstance(entry.value, nn.Module):
                modules.append(entry.value)
            elif entry.depth < _DEEPEST and (size := _size(entry.value)) <= left:
                left -= size
                found.extend(each for each in _inside(entry) if type(each.value) not in _PLAIN)
        except Exception:  # a dead proxy, for one, does not let itself be looked at
            continue
    return Held(modules, tensors)


def modules_beside(own: Iterable[nn.Module], held: Held) -> list[nn.Module]:
    """Return the modules that a closure holds, with those inside of them, less the model's own."""
    known = set(own)
    beside = dict.fromkeys(module for each in held.modules if each not in known for module in each.modules())
    return [module for module in beside if module not in known]


class Versions:
    """How often the tensors that a closure holds had been written to as it is made.

    Args:
        held: has the tensors.
    """

    def __init__(self, held: Held):
        tensors = [(name, tensor) for name, tensor in held.tensors if not tensor.is_inference()]
        self._tensors = [(name, tensor, tensor._version) for name, tensor in tensors]  # inference counts no writes

    def check(self, modules: Sequence[nn.Module]) -> None:
        """Raise a ClosureError if one was written to since, and is not put back with these modules."""
        changed = [each for each in self._tensors if each[1]._version != each[2]]
        if not changed:
            return
        memory = {_memory(tensor) for tensor in tensors_of(modules)} - {None}
        changed = [each for each in changed if _memory(each[1]) not in memory]
        if changed:
            names = " and ".join(name for name, _, _ in changed)
            raise ClosureError(
                f"closure changes {names} in place, and each of its runs in a probe would start from what the run "
                "before left: write x / 255 instead of x.div_(255), give a forward that writes to its input "
                "x.clone(), and keep logging, such as running.add_(loss), outside"
            )
        self._tensors = [(name, tensor, tensor._version) for name, tensor, _ in self._tensors]


class _Entry(NamedTuple):
    name: str
    value: Any
    depth: int = 0
    objects: int = 0  # how many it is an attribute of, one inside the other

    def within(self, name: str, value: Any, of_object: bool = False) -> _Entry:
        return _Entry(name, value, self.depth + 1, self.objects + of_object)


_PLAIN = frozenset({bool, int, float, str, bytes, complex, type(None), type, ModuleType})
_CONTAINERS = (list, tuple, deque, set, frozenset)
_OF_TRAINING = (torch.optim.Optimizer, LRScheduler)  # a closure that moves these is refused elsewhere
# The user's own functions are elsewhere, in a notebook too.
_INSTALLED = tuple(
    {
        str(Path(__file__).parent.parent),
        str(Path(torch.__file__).parent),
        "<frozen",
        *sysconfig.get_paths().values(),
    }
    - {sysconfig.get_path("data"), sysconfig.get_path("scripts")}
)


def _inside(entry: _Entry) -> Iterator[_Entry]:
    """Return what can be reached from something that is neither a tensor nor a module."""
    name, value = entry.name, entry.value
    if isinstance(value, FunctionType):
        yield from _in_function(entry, value)
    elif isinstance(value, MethodType):
        yield entry.within("self", value.__self__)
        yield entry.within(name, value.__func__)
    elif isinstance(value, partial):
        yield entry.within(name, value.func)
        code = getattr(value.func, "__code__", None)
        names = code.co_varnames[: code.co_argcount] if code else ()
        for index, argument in enumerate(value.args):
            yield entry.within(names[index] if index < len(names) else f"args[{index}]", argument)
        for keyword, argument in value.keywords.items():
            yield entry.within(keyword, argument)
    elif isinstance(value, _CONTAINERS):
        for index, item in enumerate(value):
            if type(item) not in _PLAIN:
                yield entry.within(f"{name}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if type(item) not in _PLAIN:
                yield entry.within(f"{name}[{key!r}]", item)
    elif not isinstance(value, (type, *_OF_TRAINING)):
        yield from _in_object(entry)


def _size(value: Any) -> int:
    """Return how many entries a container or an object has."""
    inside = value if isinstance(value, (dict, *_CONTAINERS)) else getattr(value, "__dict__", ())
    return len(inside)


def _in_function(entry: _Entry, function: FunctionType) -> Iterator[_Entry]:
    """Return the variables that a function reads; none of one that is installed, but what it wraps."""
    code = function.__code__
    if (wrapped := getattr(function, "__wrapped__", None)) is not None:
        yield entry.within(entry.name, wrapped)
    if entry.depth and code.co_filename.startswith(_INSTALLED):
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield entry.within(name, content_of(cell))
    variables = function.__globals__
    for name in names_in(code):
        if name in variables:
            yield entry.within(name, variables[name])
    if defaults := function.__defaults__:
        for name, value in zip(code.co_varnames[: code.co_argcount][-len(defaults) :], defaults, strict=True):
            yield entry.within(name, value)
    for name, value in (function.__kwdefaults__ or {}).items():
        yield entry.within(name, value)


def _in_object(entry: _Entry) -> Iterator[_Entry]:
    """Return the attributes of an object, such as a trainer, and of one that it holds, such as its agent."""
    call = getattr(type(entry.value), "__call__", None)  # noqa: B004, what it runs, not whether
    if isinstance(call, FunctionType):
        yield entry.within(entry.name, call)
    attributes = getattr(entry.value, "__dict__", None)
    if entry.objects > 1 or not isinstance(attributes, dict):
        return
    prefix = f"{entry.name or 'self'}."
    for name, value in attributes.items():
        if type(value) not in _PLAIN:
            yield entry.within(prefix + name, value, of_object=True)


def _memory(tensor: Tensor) -> int | None:
    """Return where the memory of a tensor begins, which views of it share."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # it has none, as a sparse tensor
        return None
