"""Finds the learning rate while a PyTorch training runs."""

from ._evaluators import Auto, Evaluator, EvaluatorError, Graphed, InPlace, Stacked, Streamed
from ._isolation import ClosureError
from ._tree import ALRTree
from ._version import __version__
from .probe import Probe
from .rule import FACTORS_2, FACTORS_3, FACTORS_5, FACTORS_7, Rule
from .scheduler import AutoLR

__all__ = [
    "FACTORS_2",
    "FACTORS_3",
    "FACTORS_5",
    "FACTORS_7",
    "ALRTree",
    "Auto",
    "AutoLR",
    "ClosureError",
    "Evaluator",
    "EvaluatorError",
    "Graphed",
    "InPlace",
    "Probe",
    "Rule",
    "Stacked",
    "Streamed",
    "__version__",
]
