"""When the loss on examples held back has stopped falling, and the annealing that begins then."""

from __future__ import annotations

import math
from bisect import insort
from statistics import median
from typing import Any

__all__ = ["HeldBack"]

# Figures are of the study, watched every 10 steps. With wrong labels an alarm at step 110 to 150 is best.
_FEWEST = 14  # losses before an alarm: of 12, one of the clean digits stops at 120, half a point worse
_EARLIEST = 100  # steps before an alarm, five calibrations: however often it is watched, a start is no end
_SINCE = 4  # losses since the lowest before an alarm: of 3, a false one on images; of 5, one at 280 on wrong labels
# The losses have risen if the lowest is so long ago and the median since then so much above it:
_SETTLED = 0.25  # of the steps done: at 0.3 the latest alarm on wrong labels moves from step 160 to 280
_RISE = 0.25  # of the fall: at 0.2 one regression stops at 240, 40 % worse; at 0.3 two alarms are late
_PATIENCE = 0.5  # of the steps done without a new low, risen or not: at 0.4 there are false alarms on regression
_LENGTH = 0.5  # of the steps until the alarm: wrong labels, alarm at 150, 97.7 %; as long again, 96.5


class HeldBack:
    """Sees losses on examples held back, and gives the alarm when they have stopped falling.

    They have stopped if there is no new low for half of the steps done. They have also if there is none for a
    quarter, and the median since the lowest lies above it by a quarter of the fall from the first. From then on a
    straight line leads to zero, half as long as the training until then. Losses that are not finite say nothing,
    nor do any that are never below the first.

    Attributes:
        began: optimizer steps done at the alarm; ``None`` before.

    Example:
        >>> held_back = HeldBack()
        >>> losses = [4.0, 3.0, 2.0, *[1.0] * 2, *[1.5] * 15]
        >>> [step for step, loss in zip(range(10, 500, 10), losses) if held_back.add(step, loss)]
        [140]
        >>> held_back.end, held_back.left(175)
        (210, 0.5)
    """

    def __init__(self) -> None:
        self.began: int | None = None
        self._step = 0  # of the last loss
        self._seen = 0
        self._first = math.inf
        self._lowest = math.inf
        self._lowest_step = 0
        self._since: list[float] = []  # the losses since the lowest, sorted

    @property
    def end(self) -> int | None:
        """Optimizer steps done when nothing is left of the learning rate; ``None`` before the alarm."""
        return None if self.began is None else self.began + math.ceil(_LENGTH * self.began)

    def left(self, step: int) -> float:
        """Return what is left of the multiplier at the alarm after ``step`` optimizer steps, 1 to 0."""
        if self.began is None or self.end is None:
            return 1.0
        return min(1.0, max(0.0, (self.end - step) / (self.end - self.began)))

    def add(self, step: int, loss: float) -> bool:
        """See a loss; return whether it gives the alarm, which comes once.

        Args:
            step: optimizer steps done; a second loss of the same step is left out.
            loss: the lower the better.
        """
        if self.began is not None or step <= self._step or not math.isfinite(loss):
            return False
        self._step = step
        self._seen += 1
        if self._seen == 1:
            self._first = loss
        if loss < self._lowest:
            self._lowest, self._lowest_step = loss, step
            self._since.clear()
            return False
        insort(self._since, loss)
        if not self._has_stopped():
            return False
        self.began = step
        self._since.clear()
        return True

    def _has_stopped(self) -> bool:
        fallen = self._first - self._lowest
        if self._seen < _FEWEST or self._step < _EARLIEST or len(self._since) < _SINCE or fallen <= 0:
            return False
        share = 1 - self._lowest_step / self._step
        return share >= _PATIENCE or (share >= _SETTLED and median(self._since) - self._lowest > _RISE * fallen)

    def __str__(self) -> str:
        return f"lowest {self._lowest:.6g} after step {self._lowest_step}"

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes: plain values."""
        return {
            "began": self.began,
            "step": self._step,
            "seen": self._seen,
            "first": self._first,
            "lowest": self._lowest,
            "lowest_step": self._lowest_step,
            "since": list(self._since),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.began, self._step, self._seen = state["began"], state["step"], state["seen"]
        self._first, self._lowest, self._lowest_step = state["first"], state["lowest"], state["lowest_step"]
        self._since = list(state["since"])
