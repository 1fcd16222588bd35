"""Closures run as if they had never run. Knows models and random streams, no optimizers and no rates."""

from .closures import CALLED_BACKWARD, REMEDY, Closure, ClosureError, check_loss, scalar_loss
from .isolation import Isolation, check_repeatable
from .module_states import ModuleStates
from .random_streams import RandomStreams
from .replay import Replay

__all__ = [
    "CALLED_BACKWARD",
    "REMEDY",
    "Closure",
    "ClosureError",
    "Isolation",
    "ModuleStates",
    "RandomStreams",
    "Replay",
    "check_loss",
    "check_repeatable",
    "scalar_loss",
]
