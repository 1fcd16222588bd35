"""What the optimizer did in its last steps, and the line of candidates through it.

``GradientLine`` alone calls the closure.
"""

from .gradient_line import GradientLine, check_not_sharded
from .lines import Line, StepLine
from .parameters import candidate_parameters
from .schedule import ProbeSchedule, ProbeTracker, windows_for
from .snapshots import Snapshots

__all__ = [
    "GradientLine",
    "Line",
    "ProbeSchedule",
    "ProbeTracker",
    "Snapshots",
    "StepLine",
    "candidate_parameters",
    "check_not_sharded",
    "windows_for",
]
