"""Which of the probes that are due pay."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Pace"]

_STILL, _FAR = 0.1, 0.2  # of the level's logarithm
_RAREST = 8  # of the probes that are due, one at least is made


class Pace:
    """Decides which of the probes that are due are made: one in ``n``.

    At first ``n`` is 1. A move of the level by less than a tenth doubles ``n``, up to 8, and so does one that takes
    back the last move. One by more than a fifth makes ``n`` 1 again. Any other leaves it.

    Attributes:
        due: probes that were due since the last one that was made.

    Example:
        >>> pace, made = Pace(), []
        >>> for probe in range(20):
        ...     if not pace.leaves_out():
        ...         made.append(probe)
        ...         pace.see(1.2 if probe < 3 else 1.0)
        >>> made
        [0, 1, 2, 3, 5, 9, 17]
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Leave none out for now."""
        self._from_one_to_next = 1
        self.due = 0
        self._moved = 0.0

    def leaves_out(self) -> bool:
        """Count a probe that is due, and return whether it is left out."""
        self.due += 1
        return self.due < self._from_one_to_next

    def see(self, factor: float) -> None:
        """See by how much a probe that was made moved the level."""
        moved = math.log(factor)
        if abs(moved) < _STILL or moved * self._moved < 0:
            self._from_one_to_next = min(2 * self._from_one_to_next, _RAREST)
        elif abs(moved) >= _FAR:
            self._from_one_to_next = 1
        self._moved, self.due = moved, 0

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes."""
        return {"from_one_to_next": self._from_one_to_next, "due": self.due, "moved": self._moved}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._from_one_to_next, self.due = state["from_one_to_next"], state["due"]
        self._moved = state["moved"]
