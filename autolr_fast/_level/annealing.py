"""Annealing: what the level is multiplied by as training goes from its start (0) to its end (1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

__all__ = ["ANNEALINGS", "Annealing", "check_multiplier", "resolve_annealing"]

Annealing = Callable[[float], float]
"""From the fraction of training done, 0 to 1, to a multiplier of the level."""


def _cosine(fraction: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * fraction))


def _linear(fraction: float) -> float:
    return 1.0 - fraction


ANNEALINGS: Mapping[str, Annealing] = {"cosine": _cosine, "linear": _linear}
"""By name."""


def resolve_annealing(anneal: str | Annealing) -> Annealing:
    """Return the annealing that ``anneal`` names, or ``anneal`` itself after trial calls at 0, 1/2 and 1.

    Raises:
        ValueError: if the name is not known, or a callable does not return finite numbers that are not negative.
        TypeError: if it is neither a name nor callable.
    """
    names = ", ".join(repr(name) for name in ANNEALINGS)
    if isinstance(anneal, str):
        if anneal not in ANNEALINGS:
            raise ValueError(f"anneal={anneal!r} is not known: use one of {names}, or a callable")
        return ANNEALINGS[anneal]
    if not callable(anneal):
        raise TypeError(
            f"anneal={anneal!r}: expected one of {names}, or a callable from a fraction to a multiplier"
        )
    for fraction in (0.0, 0.5, 1.0):
        check_multiplier(anneal, fraction, anneal(fraction))
    return anneal


def check_multiplier(anneal: Annealing, fraction: float, multiplier: object) -> None:
    """Raise a ValueError if what an annealing returned is not a finite number that is not negative."""
    if type(multiplier) is float and 0.0 <= multiplier < math.inf:
        return  # as nearly always, and at every step: what an abstract class asks takes longer
    if not isinstance(multiplier, Real) or not math.isfinite(multiplier) or multiplier < 0:
        raise ValueError(
            f"anneal={anneal!r} returned {multiplier!r} at {fraction}: it must return a finite number >= 0"
        )
