"""Finds the learning rate while a PyTorch training runs."""

from .candidates import Line
from .evaluators import EVALUATORS, Auto, Evaluator, EvaluatorError, Folded, Graphed, InPlace, Stacked, Streamed
from .isolation import Closure, ClosureError, Isolation
from .probe import Probe
from .scheduler import AutoLR
from .scoring import FACTORS_2, FACTORS_3, FACTORS_5, FACTORS_7
from .tree import ALRTree

__all__ = [
    "EVALUATORS",
    "FACTORS_2",
    "FACTORS_3",
    "FACTORS_5",
    "FACTORS_7",
    "ALRTree",
    "Auto",
    "AutoLR",
    "Closure",
    "ClosureError",
    "Evaluator",
    "EvaluatorError",
    "Folded",
    "Graphed",
    "InPlace",
    "Isolation",
    "Line",
    "Probe",
    "Stacked",
    "Streamed",
    "__version__",
]

__version__ = "0.1.0"
