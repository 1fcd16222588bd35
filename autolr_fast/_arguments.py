"""Checks of arguments: an error names the argument, the value and the remedy."""

from __future__ import annotations

import math

__all__ = ["check_count", "check_fraction", "check_limits"]


def check_count(name: str, value: object, at_least: int, of: str = "optimizer steps") -> None:
    """Raise a TypeError or ValueError if a value is not a whole number, or too small."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected a whole number of {of}, {at_least} or more")
    if value < at_least:
        raise ValueError(f"{name}={value!r}: expected {at_least} or more {of}")


def check_fraction(name: str, value: object, of: str) -> None:
    """Raise a TypeError or ValueError if a value is not a number from 0 to 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected a fraction of {of}, 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a fraction of {of}, 0 to 1")


def check_limits(lr_limits: object) -> tuple[float, float]:
    """Return the lowest and the highest learning rate.

    Raises:
        ValueError: if they do not bound anything.
    """
    limits = tuple(lr_limits) if isinstance(lr_limits, (tuple, list)) else ()
    numbers = len(limits) == 2 and all(isinstance(limit, (int, float)) for limit in limits)
    if not numbers or not 0 < limits[0] <= limits[1] < math.inf:
        raise ValueError(
            f"lr_limits={lr_limits!r}: give the lowest and the highest learning rate, 0 < lowest <= highest, "
            "both finite"
        )
    return float(limits[0]), float(limits[1])
