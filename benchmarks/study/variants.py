"""AutoLR with one thing changed: its parts switched off, and their constants moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from autolr_fast import FACTORS_3, AutoLR, Rule

__all__ = ["VARIANTS", "method_with"]

VARIANTS: Mapping[str, tuple[Callable[..., AutoLR], dict[str, Any]]] = {
    "as the source": (AutoLR.paper, {}),
    "Factor_3": (AutoLR, {"rule": Rule(FACTORS_3)}),
    "not calibrated": (AutoLR, {"calibration_steps": 0}),
    "one step calibrated": (AutoLR, {"calibration_steps": 1}),
    "calibration alone": (AutoLR, {"probe_every_steps": None}),
    **{f"heat {heat:g}": (AutoLR, {"max_heat": heat}) for heat in (0.1, 0.2, 0.5)},
    "any heat": (AutoLR, {"max_heat": math.inf, "rule": Rule()}),
    **{f"every {every}": (AutoLR, {"probe_every_steps": every}) for every in (5, 20)},
    "probed to the end": (AutoLR, {"probe_until_fraction": 1.0}),
    "probed for a third": (AutoLR, {"probe_until_fraction": 1 / 3}),
    "annealed in a straight line": (AutoLR, {"anneal": "linear"}),
    "not annealed": (AutoLR, {"anneal": lambda _: 1.0}),
    "no known length": (AutoLR, {"total_steps": None}),
}
"""Name -> the class and its arguments."""


def method_with(change: str) -> str:
    """Return what the method is called that is AutoLR with one of these changes."""
    return f"AutoLR, {change}"
