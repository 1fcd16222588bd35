"""Closures run as if they had never run. Knows models and random streams, no optimizers and no rates."""

from .closures import CALLED_BACKWARD, REMEDY, Closure, ClosureError, NeedsGradientsError, check_loss, scalar_loss
from .held import modules_beside
from .inventory import Inventory
from .isolation import Isolation, check_repeatable
from .module_states import ModuleStates
from .probed import Probed, probed
from .random_streams import RandomStreams
from .replay import Replay

__all__ = [
    "CALLED_BACKWARD",
    "REMEDY",
    "Closure",
    "ClosureError",
    "Inventory",
    "Isolation",
    "ModuleStates",
    "NeedsGradientsError",
    "Probed",
    "RandomStreams",
    "Replay",
    "check_loss",
    "check_repeatable",
    "modules_beside",
    "probed",
    "scalar_loss",
]
