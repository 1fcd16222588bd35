"""Which optimizer steps are probed, and over how many steps back."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .._arguments import check_count
from .._isolation import ClosureError

__all__ = ["ProbeSchedule", "ProbeTracker"]


@dataclass
class ProbeSchedule:
    """Says for each optimizer step whether a probe is due, and over how many steps back.

    Args:
        every_steps: a probe is due at each multiple, up to ``last_step``; ``None`` for none of them.
        first_steps: a probe is due at each of so many of the first steps.
        windows: optimizer steps that a line spans; they take turns.
        last_step: with a multiple of ``every_steps`` to be probed.
        mean_steps: from where averages begin to the step that is probed; 0 for none. The close probes of the first
            steps need none.

    Attributes:
        close_from: the step from which on a probe is due at each of as many steps as ``first_steps``.
        searched_step: one besides, of a line over that step alone: the first step of what did not move before.

    Raises:
        TypeError: if a number of steps is not a whole number.
        ValueError: if one is too small.

    Example:
        >>> schedule = ProbeSchedule(every_steps=10, first_steps=3, windows=(1, 2), last_step=40)
        >>> {step: window for step in range(1, 99) if (window := schedule.window_at(step))}
        {1: 1, 2: 2, 3: 1, 10: 2, 20: 1, 30: 2, 40: 1}
        >>> {step: windows for step in range(99) if (windows := schedule.windows_from(step))}
        {0: [1, 2], 1: [2], 2: [1], 8: [2], 19: [1], 28: [2], 39: [1]}
        >>> schedule.mean_steps = 6
        >>> {step: windows for step in range(3, 30) if (windows := schedule.windows_from(step))}
        {4: [6], 8: [2], 9: [1], 14: [6], 19: [1], 24: [6], 28: [2], 29: [1]}
    """

    every_steps: int | None
    first_steps: int
    windows: Sequence[int]
    last_step: float = math.inf
    mean_steps: int = 0
    close_from: int = field(default=0, init=False)
    searched_step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.first_steps = check_count("calibration_steps", self.first_steps, at_least=0)
        if self.every_steps is not None:
            self.every_steps = check_count("probe_every_steps", self.every_steps, at_least=1)

    def window_at(self, step: int) -> int | None:
        """Return the window of the probe that is due after so many optimizer steps, or ``None`` if none is."""
        if step == self.searched_step:
            return 1 if step else None
        if self.is_close(step):
            turn = step - 1
        elif self.every_steps and 1 <= step <= self.last_step and step % self.every_steps == 0:
            turn = step // self.every_steps
        else:
            return None
        return min(self.windows[turn % len(self.windows)], step)

    def is_close(self, step: int) -> bool:
        """Whether a step is one of the first, or of the first of parameters that came later."""
        return 1 <= step - self.close_from <= self.first_steps

    def windows_from(self, step: int, now: int | None = None) -> list[int]:
        """Return the windows of the probes after ``now`` (default: ``step``) that open after ``step`` steps."""
        first = 1 if now is None else now + 1 - step
        spans: Sequence[int] = _spans(tuple(self.windows), self.mean_steps)
        if step == 0:  # early probes have the windows that there is room for
            spans = range(1, spans[-1] + 1)
        return [span for span in spans if span >= first and span in self._windows_at(step + span)]

    def _windows_at(self, step: int) -> Collection[int]:
        """Return the windows of a probe, that of averages and the last step that these leave out."""
        window = self.window_at(step)
        if window is None:
            return ()
        if self.is_close(step):
            return {window, 2}
        has_mean = self.mean_steps and step != self.searched_step
        return {window, 1, self.mean_steps} if has_mean else {window}


@cache
def _spans(windows: tuple[int, ...], mean_steps: int) -> list[int]:
    """Return over how many steps back a probe may look, in order; 0 finds no window."""
    return sorted({*windows, 1, 2, mean_steps})


class ProbeTracker:
    """Knows which of the scheduled probes were made, and which were missed.

    Args:
        schedule: says which steps are to be probed.

    Attributes:
        schedule: as given.
        probed: the last step that was probed.
        offered: the last step whose probe was given a closure, probed or not.
    """

    def __init__(self, schedule: ProbeSchedule):
        self.schedule = schedule
        self.probed = 0
        self.offered = 0
        self._since = 0  # steps that were done when a state was loaded, which may be of another schedule

    def window_due(self, step: int) -> int | None:
        """Return the window of the probe that is to be made now; ``None`` if there is none, or it was made."""
        return None if step == self.probed else self.schedule.window_at(step)

    def missed(self, steps: range) -> str:
        """Return what to tell the user if one of these steps was to be probed and was given no closure.

        Raises:
            ClosureError: if calibration is over, and none was ever given.
        """
        known = max(self.offered, self._since)
        if not any(step > known and self.schedule.window_at(step) for step in steps):
            return ""
        if self.offered == 0 and steps.stop > self.schedule.first_steps:
            raise ClosureError(
                f"none of the probes due in {steps.stop - 1} steps could be made, so no learning rate was searched "
                "for. The loss of each step goes through AutoLR: "
                + _LOOP
                + ". SequentialLR cannot hold an AutoLR: it anneals by itself"
            )
        return f"a probe was due, but no loss came through AutoLR for this step, and the level stays: {_LOOP}"

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes."""
        return {"probed": self.probed, "offered": self.offered}

    def load(self, state: dict[str, Any], steps: int) -> None:
        """Take over what :meth:`state` returned after so many optimizer steps."""
        self.probed, self.offered = state["probed"], state["offered"]
        self._since = steps


_LOOP = (
    "compute it by `loss = scheduler.loss(lambda: loss_fn(model(x), y))` before optimizer.step(), and call "
    "scheduler.step() after it, at every step"
)
