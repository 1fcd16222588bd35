"""A closure keeps the batch that it ran on, though the loop's variables go on to the next."""

from __future__ import annotations

import builtins
from functools import lru_cache
from types import CellType, CodeType, FunctionType

from torch import Tensor

from .closures import Closure

__all__ = ["UNBOUND", "bound", "content_of", "names_in"]

UNBOUND = object()
"""What a cell contains that is not bound yet."""


def bound(closure: Closure) -> Closure:
    """Return a closure that reads its free and global variables as they are now.

    Python looks variables up when a function runs: ``lambda: loss_fn(model(x), y)`` reads the ``x`` of that moment.
    A callable that is no function of Python, such as a ``functools.partial``, is returned as it is, and what the
    function calls reads its own variables.

    Args:
        closure: returns the scalar loss.

    Example:
        >>> x = 1
        >>> closure = bound(lambda: x)
        >>> x = 2
        >>> closure()
        1
    """
    if not isinstance(closure, FunctionType):
        return closure
    original: Closure = closure
    cells = closure.__closure__ or ()
    contents = [content_of(cell) for cell in cells]
    names = names_in(closure.__code__)
    values = [closure.__globals__.get(name, UNBOUND) for name in names]

    def run() -> Tensor:
        stays = all(content_of(cell) is content for cell, content in zip(cells, contents, strict=True))
        found = [closure.__globals__.get(name, UNBOUND) for name in names]
        if stays and all(one is other for one, other in zip(found, values, strict=True)):
            return original()
        rebuilt = _rebuilt(closure, contents, dict(zip(names, values, strict=True)))
        return rebuilt()

    return run


def _rebuilt(closure: FunctionType, contents: list[object], values: dict[str, object]) -> Closure:
    """Return the function with other contents of its cells and other global variables."""
    cells = tuple(CellType() if content is UNBOUND else CellType(content) for content in contents)
    variables = {"__builtins__": builtins, **closure.__globals__, **values}
    variables = {name: value for name, value in variables.items() if value is not UNBOUND}
    again = FunctionType(closure.__code__, variables, closure.__name__, closure.__defaults__, cells or None)
    again.__kwdefaults__ = closure.__kwdefaults__
    return again


def content_of(cell: CellType) -> object:
    """Return what a free variable is, or :data:`UNBOUND`."""
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return UNBOUND


@lru_cache(maxsize=1024)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Return the names of global variables, and of attributes, that a function and those inside of it read."""
    inside = [name for each in code.co_consts if isinstance(each, CodeType) for name in names_in(each)]
    return tuple(dict.fromkeys([*code.co_names, *inside]))
