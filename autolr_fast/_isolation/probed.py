"""A closure, and what is known of it before a probe runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .closures import Closure
from .held import Held, held_by
from .inventory import Inventory

__all__ = ["Probed", "probed"]


class Probed(ABC):
    """A closure that a probe runs.

    Attributes:
        needs_gradients: whether it runs with gradients on, as the loss differentiates something itself.
        rewinds: whether it begins by setting the random-number streams.
        inventory: what its model held when it ran last, if that is known.
    """

    needs_gradients = False
    rewinds = False
    inventory: Inventory | None = None

    @abstractmethod
    def __call__(self) -> Tensor:
        """Return the loss."""

    @abstractmethod
    def held(self) -> Held:
        """Return what it can reach."""


def probed(closure: Closure) -> Probed:
    """Return the closure with what it holds, found once; one that has it as it is."""
    return closure if isinstance(closure, Probed) else _Given(closure)


class _Given(Probed):
    def __init__(self, closure: Closure):
        self._closure = closure
        self._held = held_by(closure)

    def __call__(self) -> Tensor:
        return self._closure()

    def held(self) -> Held:
        return self._held
