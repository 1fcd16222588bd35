"""AutoLR with one thing changed: its parts switched off, and what was tried to make it better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autolr_fast import FACTORS_3, FACTORS_5, FACTORS_7, AutoLR
from autolr_fast.annealing import ANNEALINGS
from autolr_fast.calibration import Look, steady_state
from autolr_fast.candidates import Line, candidate_parameters
from autolr_fast.isolation import Closure
from autolr_fast.snapshots import Cadence

__all__ = ["VARIANTS", "method_with"]

_WARM = 0.3


class _Both(Cadence):
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

    def _search(self, line: Line, closure: Closure) -> tuple[int, Look, Tensor]:
        found = super()._search(line, closure)
        if self._searched:
            momentum = self.optimizer.param_groups[0].get("momentum", 0.0)
            ratio = self._caution * (1 - momentum) ** self._power / steady_state(self.optimizer, warm=False)
            self._rates.set_level(self._rates.level * ratio)
        return found


class Leashed(AutoLR):
    """Draws the level back to the one after the first step a little at every probe.

    Args:
        leash: share of the logarithm of their ratio by which it is drawn.
    """

    def __init__(self, *args: Any, leash: float, **options: Any):
        super().__init__(*args, **options)
        self._leash = leash
        self._anchor = 0.0

    def _probe(self, closure: Closure, window: int, now: int) -> None:
        searched = self._searched
        super()._probe(closure, window, now)
        level = math.log(self._rates.level.item())
        if not searched:
            self._anchor = level
        elif self._probed_step == now:
            drawn = self._leash * (self._anchor - level) * self._rates.multiplier(now)
            self._rates.set_level(math.exp(level + drawn))
            self._rates.apply(now)


class Combined(AutoLR):
    """Looks along the lines of all windows at every probe, and moves by what they say together, unguarded.

    Args:
        combine: from the logarithms of their factors to that of the factor that the level moves by.
    """

    def __init__(self, *args: Any, combine: Callable[[Sequence[float]], float], **options: Any):
        super().__init__(*args, **options)
        self._combine = combine
        self._cadence = _Both(**vars(self._cadence))
        self._snapshots._cadence = self._cadence

    def _probe(self, closure: Closure, window: int, now: int) -> None:
        if not self._searched:
            super()._probe(closure, 1, now)
            return
        parameters = candidate_parameters(self.model, self.optimizer)
        names: dict[nn.Parameter, str] = {parameter: name for name, parameter in parameters.items()}
        said = []
        for span in sorted({min(each, now) for each in self._cadence.windows}):
            line = self._snapshots.line(self.optimizer, span, names)
            if line is not None:
                scratch = torch.ones_like(self._rates.level)
                self._follow(self._look(line, self.factors, closure).losses, scratch)
                said.append(math.log(scratch.item()))
        moved = self._combine(said) * self._rates.multiplier(now)
        self._rates.set_level(self._rates.level * math.exp(moved))
        self._probed_step = now
        self._snapshots.drop_used()
        self._rates.apply(now)


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
    "not calibrated": (AutoLR, {"calibrate": 0}),
    "one step calibrated": (AutoLR, {"calibrate": 1}),
    "five steps calibrated": (AutoLR, {"calibrate": 5}),
    "ten steps calibrated": (AutoLR, {"calibrate": 10}),
    "calibration alone": (AutoLR, {"calibrate": 1, "every": None}),
    "calibration alone, 20 steps": (AutoLR, {"every": None}),
    "not annealed": (AutoLR, {"anneal": lambda _: 1.0}),
    "warmed up": (AutoLR, {"anneal": _warmed_up}),
    "annealed on plateaus": (AutoLR, {"total_steps": None, "anneal": "plateau"}),
    **{f"window {window}": (AutoLR, {"window": window}) for window in (1, 2, 3, 4)},
    **{f"windows 1 and {window}": (AutoLR, {"window": (1, window)}) for window in (2, 3, 4)},
    "windows 2 and 4": (AutoLR, {"window": (2, 4)}),
    "windows 1, 2 and 4": (AutoLR, {"window": (1, 2, 4)}),
    "high start": (Started, {"caution": 1.0, "power": 0.5}),
    "start at (1 - momentum)": (Started, {"caution": 1.0, "power": 1.0}),
    "leash 0.1": (Leashed, {"leash": 0.1}),
    "not guarded": (AutoLR, {"guard": 0}),
    "guard 4": (AutoLR, {"guard": 4}),
    "windows 1, 2 and 3": (AutoLR, {"window": (1, 2, 3)}),
    "windows 2 and 3": (AutoLR, {"window": (2, 3)}),
    "windows averaged, every 20": (Combined, {"combine": _mean, "window": (1, 2), "every": 20}),
    "windows agreeing": (Combined, {"combine": _agreed, "window": (1, 2)}),
    "windows agreeing, every 20": (Combined, {"combine": _agreed, "window": (1, 2), "every": 20}),
    **{f"every {every}": (AutoLR, {"every": every}) for every in (1, 3, 20, 30)},
    "probed to the end": (AutoLR, {"until": 1.0}),
    "probed for a third": (AutoLR, {"until": 1 / 3}),
    "factors 1.3, 1/1.3": (AutoLR, {"factors": (1.3, 1 / 1.3)}),
    "factors 2, 1/2": (AutoLR, {"factors": (2.0, 0.5)}),
    "Factor_3": (AutoLR, {"factors": FACTORS_3}),
    "factors 3, 1, 1/3": (AutoLR, {"factors": (3.0, 1.0, 1 / 3)}),
    "Factor_5": (AutoLR, {"factors": FACTORS_5}),
    "Factor_7": (AutoLR, {"factors": FACTORS_7}),
}
"""Name -> the class and its arguments."""


def method_with(change: str) -> str:
    """Return what the method is called that is AutoLR with one of these changes."""
    return f"AutoLR, {change}"
