"""What a search over learning rates has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Branch", "Epoch", "prune"]


class Branch(NamedTuple):
    """One training of an epoch.

    Attributes:
        parent: index of the beam it started from, 0 the best of the epoch before.
        lr: its learning rate.
        loss: mean training loss of the epoch; may not be finite.
    """

    parent: int
    lr: float
    loss: float


class Epoch(NamedTuple):
    """All branches of an epoch, and which of them go on.

    Attributes:
        number: 1 for the first.
        branches: in the order of their beams, and of the factors within a beam.
        survivors: indices of the branches that are the beams of the next epoch, best first.
    """

    number: int
    branches: tuple[Branch, ...]
    survivors: tuple[int, ...]

    @property
    def best(self) -> Branch:
        """The branch of the lowest loss."""
        return self.branches[self.survivors[0]]


def prune(losses: Sequence[float], beams: int) -> tuple[int, ...]:
    """Return the indices of the lowest finite losses, ascending, at most ``beams`` of them.

    Equal losses go by index: the better beam first, then the order of the factors.

    Example:
        >>> prune([0.5, 0.2, float("nan"), 0.2], beams=3)
        (1, 3, 0)
    """
    finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
    return tuple(sorted(finite, key=lambda index: losses[index])[:beams])
