"""AutoLR with one thing changed: its parts switched off, and what was tried to make it better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autolr_fast import FACTORS_3, FACTORS_5, FACTORS_7, AutoLR, Rule
from autolr_fast._calibration import start_ratio
from autolr_fast._isolation import Closure
from autolr_fast._level.annealing import ANNEALINGS
from autolr_fast._steps import ProbeSchedule, candidate_parameters

__all__ = ["VARIANTS", "method_with"]

_WARM = 0.3


class _Both(ProbeSchedule):
    """Keeps what the lines of all windows need at every probe, where else they take turns."""

    def windows_from(self, step: int, now: int | None = None) -> list[int]:
        """Return the windows of the probes after ``now`` that open after ``step`` steps."""
        first = step + 1 if now is None else now + 1
        due = [m for m in range(first, step + max(self.windows) + 1) if self.window_at(m)]
        return [m - step for m in due if m - step in self.windows]


class Started(AutoLR):
    """Starts after the first step at another level than the package does.

    Args:
        caution: times the rate that suits the first step.
        power: of 1 - momentum, times that.
    """

    def __init__(self, *args: Any, caution: float, power: float, **options: Any):
        super().__init__(*args, **options)
        self._caution = caution
        self._power = power

    def _probe(self, closure: Closure, window: int, now: int, *seen: Any) -> float | None:
        retaken = super()._probe(closure, window, now, *seen)
        if self._calibration.has_found and len(self.history) == 1:
            momentum = self.optimizer.param_groups[0].get("momentum", 0.0)
            ratio = self._caution * (1 - momentum) ** self._power / start_ratio(self._optimizers.param_groups)
            self._level.start_at(self._level.value * ratio)
            self._level.apply(now)
        return retaken


class Leashed(AutoLR):
    """Draws the level back to the one after the first step a little at every probe.

    Args:
        leash: share of the logarithm of their ratio by which it is drawn.
    """

    def __init__(self, *args: Any, leash: float, **options: Any):
        super().__init__(*args, **options)
        self._leash = leash
        self._anchor = 0.0

    def _probe(self, closure: Closure, window: int, now: int, *seen: Any) -> float | None:
        searching = self._calibration.is_searching(now)
        retaken = super()._probe(closure, window, now, *seen)
        level = math.log(self._level.value.item())
        if searching:
            self._anchor = level
        elif self._tracker.probed == now:
            drawn = self._leash * (self._anchor - level) * self._level.multiplier(now)
            self._level.start_at(math.exp(level + drawn))
            self._level.apply(now)
        return retaken


class Combined(AutoLR):
    """Looks along the lines of all windows at every probe, and moves by what they say together, unguarded.

    Args:
        combine: from the logarithms of their factors to that of the factor that the level moves by.
    """

    def __init__(self, *args: Any, combine: Callable[[Sequence[float]], float], **options: Any):
        super().__init__(*args, **options)
        self._combine = combine
        self._tracker.schedule = self._snapshots._schedule = _both(self._tracker.schedule)

    def _probe(self, closure: Closure, window: int, now: int, *seen: Any) -> float | None:
        if self._calibration.is_searching(now):
            return super()._probe(closure, 1, now, *seen)
        names = candidate_parameters(self._prober.model, self._optimizers)
        said = []
        for span in sorted({min(each, now) for each in self._tracker.schedule.windows}):
            line = self._snapshots.line(span, now, names)
            if line is not None:
                _, factor = self._rule.weigh(self._prober.look(line, closure, self._rule.factors).costs)
                said.append(math.log(factor.item()))
        moved = self._combine(said) * self._level.multiplier(now)
        self._level.start_at(self._level.value * math.exp(moved))
        self._losses.forget()
        self._tracker.probed = now
        self._snapshots.drop_used(now)
        self._level.apply(now)
        return None


def _both(schedule: ProbeSchedule) -> _Both:
    return _Both(schedule.every_steps, schedule.first_steps, schedule.windows, schedule.last_step)


def _mean(said: Sequence[float]) -> float:
    return sum(said) / len(said)


def _agreed(said: Sequence[float]) -> float:
    """Return the smaller move if all have one sign, and none otherwise."""
    return min(said, key=abs) if min(said) > 0 or max(said) < 0 else 0.0


def _warmed_up(fraction: float) -> float:
    """The shape of torch's OneCycleLR: up from a 25th until 0.3, and down to nothing."""
    cosine = ANNEALINGS["cosine"]
    if fraction < _WARM:
        return 1 - 0.96 * cosine(fraction / _WARM)
    return cosine((fraction - _WARM) / (1 - _WARM))


VARIANTS: Mapping[str, tuple[Callable[..., AutoLR], dict[str, Any]]] = {
    "as the source": (AutoLR.paper, {}),
    "not calibrated": (AutoLR, {"calibration_steps": 0}),
    "one step calibrated": (AutoLR, {"calibration_steps": 1}),
    "five steps calibrated": (AutoLR, {"calibration_steps": 5}),
    "ten steps calibrated": (AutoLR, {"calibration_steps": 10}),
    "calibration alone": (AutoLR, {"calibration_steps": 1, "probe_every_steps": None}),
    "calibration alone, 20 steps": (AutoLR, {"probe_every_steps": None}),
    "not annealed": (AutoLR, {"anneal": lambda _: 1.0}),
    "warmed up": (AutoLR, {"anneal": _warmed_up}),
    "annealed on plateaus": (AutoLR, {"total_steps": None, "anneal": "plateau"}),
    **{f"window {window}": (AutoLR, {"rule": Rule(window_steps=window)}) for window in (1, 2, 3, 4)},
    **{f"windows 1 and {window}": (AutoLR, {"rule": Rule(window_steps=(1, window))}) for window in (2, 3, 4)},
    "windows 2 and 4": (AutoLR, {"rule": Rule(window_steps=(2, 4))}),
    "windows 1, 2 and 4": (AutoLR, {"rule": Rule(window_steps=(1, 2, 4))}),
    "high start": (Started, {"caution": 1.0, "power": 0.5}),
    "start at (1 - momentum)": (Started, {"caution": 1.0, "power": 1.0}),
    "leash 0.1": (Leashed, {"leash": 0.1}),
    "not guarded": (AutoLR, {"guard_probes": 0}),
    "guard 4": (AutoLR, {"guard_probes": 4}),
    "windows 1, 2 and 3": (AutoLR, {"rule": Rule(window_steps=(1, 2, 3))}),
    "windows 2 and 3": (AutoLR, {"rule": Rule(window_steps=(2, 3))}),
    "windows averaged, every 20": (
        Combined,
        {"combine": _mean, "rule": Rule(window_steps=(1, 2)), "probe_every_steps": 20},
    ),
    "windows agreeing": (Combined, {"combine": _agreed, "rule": Rule(window_steps=(1, 2))}),
    "windows agreeing, every 20": (
        Combined,
        {"combine": _agreed, "rule": Rule(window_steps=(1, 2)), "probe_every_steps": 20},
    ),
    **{f"every {every}": (AutoLR, {"probe_every_steps": every}) for every in (1, 3, 20, 30)},
    "probed to the end": (AutoLR, {"probe_until_fraction": 1.0}),
    "probed for a third": (AutoLR, {"probe_until_fraction": 1 / 3}),
    "factors 1.3, 1/1.3": (AutoLR, {"rule": Rule((1.3, 1 / 1.3))}),
    "factors 2, 1/2": (AutoLR, {"rule": Rule((2.0, 0.5))}),
    "Factor_3": (AutoLR, {"rule": Rule(FACTORS_3)}),
    "factors 3, 1, 1/3": (AutoLR, {"rule": Rule((3.0, 1.0, 1 / 3))}),
    "Factor_5": (AutoLR, {"rule": Rule(FACTORS_5)}),
    "Factor_7": (AutoLR, {"rule": Rule(FACTORS_7)}),
}
"""Name -> the class and its arguments."""


def method_with(change: str) -> str:
    """Return what the method is called that is AutoLR with one of these changes."""
    return f"AutoLR, {change}"
