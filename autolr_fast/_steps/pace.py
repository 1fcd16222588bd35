"""Which of the probes that are due pay."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Pace"]

_STILL = 0.05  # a drift that is near 0
_RAREST = 8  # of the probes that are due, one at least is made


class Pace:
    """Decides which of the probes that are due are made: one in ``n``.

    The *drift* is a mean of the level's moves, as logarithms: each weighs as much as all before it. Moves that go
    one way, or a single large one, make it large, and ``n`` is 1. A drift near 0 doubles ``n``, up to 8.

    Attributes:
        due: probes that were due since the last one that was made.

    Example:
        >>> pace, made = Pace(), []
        >>> for probe in range(20):
        ...     if not pace.leaves_out():
        ...         made.append(probe)
        ...         pace.see(1.2 if probe < 3 else 1.0)
        >>> made
        [0, 1, 2, 3, 4, 6, 10, 18]
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Leave none out for now."""
        self._is_held = False
        self._from_one_to_next = 1
        self.due = 0
        self._drift = 0.0

    def hold(self) -> None:
        """Leave none out until :meth:`begin_anew`."""
        self._is_held = True

    def leaves_out(self, most: int = _RAREST) -> bool:
        """Count a probe that is due, and return whether it is left out.

        Args:
            most: that ``n`` may be now.
        """
        self.due += 1
        return not self._is_held and self.due < min(self._from_one_to_next, most)

    def see(self, factor: float) -> None:
        """See by how much a probe that was made moved the level."""
        self._drift = (self._drift + math.log(factor)) / 2
        is_still = abs(self._drift) < _STILL
        self._from_one_to_next = min(2 * self._from_one_to_next, _RAREST) if is_still else 1
        self.due = 0

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes."""
        return {
            "from_one_to_next": self._from_one_to_next,
            "due": self.due,
            "drift": self._drift,
            "is_held": self._is_held,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._from_one_to_next, self.due = state["from_one_to_next"], state["due"]
        self._drift, self._is_held = state["drift"], state["is_held"]
