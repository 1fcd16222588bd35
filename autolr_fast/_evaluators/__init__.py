"""N losses from the closure, one for each candidate on a line. Knows no learning rates and no rule."""

from .auto import Auto
from .base import Evaluator, EvaluatorError
from .graphed import Graphed
from .inplace import InPlace
from .prober import Look, Prober
from .stacked import Stacked
from .streamed import Streamed

__all__ = [
    "EVALUATORS",
    "Auto",
    "Evaluator",
    "EvaluatorError",
    "Graphed",
    "InPlace",
    "Look",
    "Prober",
    "Stacked",
    "Streamed",
    "resolve_evaluator",
]

EVALUATORS: dict[str, type[Evaluator]] = {kind.name: kind for kind in (Auto, Graphed, InPlace, Stacked, Streamed)}


def resolve_evaluator(evaluator: str | Evaluator) -> Evaluator:
    """Return a fresh evaluator of that name, or the given one.

    Raises:
        ValueError: if there is none of that name; lists the names.
        TypeError: if it is neither a name nor an :class:`Evaluator`.
    """
    names = ", ".join(repr(name) for name in EVALUATORS)
    if isinstance(evaluator, Evaluator):
        return evaluator
    if not isinstance(evaluator, str):
        raise TypeError(f"evaluator={evaluator!r}: expected one of {names}, or an Evaluator such as Stacked()")
    if evaluator not in EVALUATORS:
        raise ValueError(f"evaluator={evaluator!r} is not known: use one of {names}")
    return EVALUATORS[evaluator]()
