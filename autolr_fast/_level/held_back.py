"""When the loss on examples held back has stopped falling, and the annealing that begins then."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["HeldBack"]

# Figures are of the study, watched every 10 steps. With wrong labels an alarm at step 110 to 150 is best.
_FEWEST = 12  # losses before an alarm: with 10, AdamW ends 0.6 points worse on wrong labels, with 14 one
_EARLIEST = 100  # steps before an alarm, five calibrations: however often it is watched, a start is no end
_SINCE = 4  # losses since the lowest before an alarm
_GAP = 0.1  # of the fall, by which training is below: 0.15 to 0.23 with wrong labels, 0.08 at most on clean digits
_SETTLED = 0.2  # of the steps done without a new low, if training is below
_PATIENCE = 2 / 3  # of them, if it is not: at 0.6 there are 2 false alarms in 36 trainings, at 0.5 there are 8
_LENGTH = 0.5  # of the steps until the alarm: wrong labels, alarm at 150, 97.7 %; as long again, 96.5


class HeldBack:
    """Sees losses on examples held back, and gives the alarm when they have stopped falling.

    They have stopped if there is no new low for a fifth of the steps done, and the training loss is below the
    lowest by a tenth of the fall from the first: training goes on to learn what these examples do not know. They
    have stopped too if there is no new low for two thirds of the steps. From then on a straight line leads to
    zero, half as long as the training until then. Losses that never were below the first wait for two thirds too,
    and stop if the training loss is below them. Losses that are not finite say nothing.

    Attributes:
        began: optimizer steps done at the alarm; ``None`` before.
        interval: optimizer steps between the last two losses.

    Example:
        >>> held_back = HeldBack()
        >>> losses = [4.0, 3.0, 2.0, *[1.0] * 2, *[1.5] * 15]
        >>> [step for step, loss in zip(range(10, 500, 10), losses) if held_back.add(step, loss, training=0.5)]
        [120]
        >>> held_back.end, held_back.left(150)
        (180, 0.5)
    """

    def __init__(self) -> None:
        self.began: int | None = None
        self.interval = 0
        self._step = 0  # of the last loss
        self._seen = 0
        self._first = math.inf
        self._lowest = math.inf
        self._lowest_step = 0
        self._since = 0  # losses since the lowest

    @property
    def end(self) -> int | None:
        """Optimizer steps done when nothing is left of the learning rate; ``None`` before the alarm."""
        return None if self.began is None else self.began + math.ceil(_LENGTH * self.began)

    def left(self, step: int) -> float:
        """Return what is left of the multiplier at the alarm after ``step`` optimizer steps, 1 to 0."""
        if self.began is None or self.end is None:
            return 1.0
        return min(1.0, max(0.0, (self.end - step) / (self.end - self.began)))

    def add(self, step: int, loss: float, training: float) -> bool:
        """See a loss; return whether it gives the alarm, which comes once.

        Args:
            step: optimizer steps done; a second loss of the same step is left out.
            loss: the lower the better.
            training: the mean training loss of late; not a number if it is not known.
        """
        if self.began is not None or step <= self._step or not math.isfinite(loss):
            return False
        self.interval = step - self._step
        self._step = step
        self._seen += 1
        if self._seen == 1:
            self._first = loss
        if loss < self._lowest:
            self._lowest, self._lowest_step, self._since = loss, step, 0
            return False
        self._since += 1
        if not self._has_stopped(training):
            return False
        self.began = step
        return True

    def _has_stopped(self, training: float) -> bool:
        fallen = self._first - self._lowest
        if self._seen < _FEWEST or self._step < _EARLIEST or self._since < _SINCE:
            return False
        is_below = self._lowest - training > _GAP * fallen
        has_settled = 1 - self._lowest_step / self._step >= (_SETTLED if is_below and fallen > 0 else _PATIENCE)
        return has_settled and (is_below or fallen > 0)

    def __str__(self) -> str:
        return f"lowest {self._lowest:.6g} after step {self._lowest_step}"

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes: plain values."""
        return {
            "began": self.began,
            "interval": self.interval,
            "step": self._step,
            "seen": self._seen,
            "first": self._first,
            "lowest": self._lowest,
            "lowest_step": self._lowest_step,
            "since": self._since,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.began, self.interval = state["began"], state["interval"]
        self._step, self._seen = state["step"], state["seen"]
        self._first, self._lowest, self._lowest_step = state["first"], state["lowest"], state["lowest_step"]
        self._since = state["since"]
