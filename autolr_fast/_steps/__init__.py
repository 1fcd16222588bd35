"""What the training did in its last steps: their losses, and the line of candidates through them.

``GradientLine`` alone calls the closure.
"""

from .counter import StepCounter
from .gradient_line import GradientLine, check_not_sharded
from .hooks import StepHooks
from .host_memory import memory_for
from .lines import Line, StepLine, lengths
from .losses import Losses
from .pace import Pace
from .parameters import candidate_parameters
from .schedule import ProbeSchedule, ProbeTracker
from .snapshots import Snapshots

__all__ = [
    "GradientLine",
    "Line",
    "Losses",
    "Pace",
    "ProbeSchedule",
    "ProbeTracker",
    "Snapshots",
    "StepCounter",
    "StepHooks",
    "StepLine",
    "candidate_parameters",
    "check_not_sharded",
    "lengths",
    "memory_for",
]
