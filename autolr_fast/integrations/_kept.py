"""What plain objects hold, and how it is put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

from .._isolation.inventory import cut, put_back

__all__ = ["Kept"]

_LONG = 1000  # entries
_DEEPEST = 4  # containers one inside the other


class Kept:
    """The attributes of objects, and the lists, dicts, sets and deques in them, as they are now.

    Of a list or deque of more than 1,000 entries the length is kept: what is appended is removed. A dict or set of
    more keeps what comes. Other objects and the values of tensors are not looked into.

    Args:
        *objects: such as a trainer.
        but: names of attributes whose containers are not looked into, such as a data set.

    Example:
        >>> from collections import Counter
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(tokens=3, metrics={"loss": [1.0]}, seen=Counter(a=1))
        >>> kept = Kept(trainer)
        >>> trainer.tokens += 3
        >>> trainer.metrics["loss"].append(2.0)
        >>> trainer.seen["a"] += 1
        >>> kept.restore()
        >>> trainer
        namespace(tokens=3, metrics={'loss': [1.0]}, seen=Counter({'a': 1}))
    """

    def __init__(self, *objects: object, but: Collection[str] = ()):
        self._kept: list[tuple[Any, Any]] = []  # each container, and its copy or length
        self._seen: set[int] = set()
        for each in objects:
            attributes = vars(each)
            self._keep(attributes, 0)
            self._inside([value for name, value in attributes.items() if name not in but], 1)

    def restore(self) -> None:
        """Put all back."""
        for live, saved in self._kept:
            if isinstance(saved, int):
                cut(live, saved)
            else:
                put_back(live, saved)

    def _inside(self, values: Collection[Any], depth: int) -> None:
        for value in values:
            if isinstance(value, (list, dict, set, deque)) and id(value) not in self._seen:
                self._keep(value, depth)
                if depth < _DEEPEST and len(value) <= _LONG:
                    self._inside(value.values() if isinstance(value, dict) else value, depth + 1)

    def _keep(self, container: Any, depth: int) -> None:
        self._seen.add(id(container))
        if not depth or len(container) <= _LONG:
            self._kept.append((container, container.copy()))
        elif isinstance(container, (list, deque)):
            self._kept.append((container, len(container)))
