"""Checks of arguments: an error names the argument, the value and the remedy."""

from __future__ import annotations

import math
from numbers import Integral, Real

from torch import Tensor

__all__ = ["check_count", "check_fraction", "check_limits", "check_scalar", "is_count", "is_number"]


def is_count(value: object) -> bool:
    """Whether a value is a whole number, of Python or NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_count(name: str, value: int, at_least: int, of: str = "optimizer steps") -> int:
    """Return a whole number as Python's; raise a TypeError or ValueError if it is none, or too small."""
    if not is_count(value):
        raise TypeError(f"{name}={value!r}: expected a whole number of {of}, {at_least} or more")
    if value < at_least:
        raise ValueError(f"{name}={value!r}: expected {at_least} or more {of}")
    return int(value)


def check_fraction(name: str, value: float, of: str) -> float:
    """Return a number from 0 to 1 as Python's; raise a TypeError or ValueError if it is none."""
    if not is_number(value):
        raise TypeError(f"{name}={value!r}: expected a fraction of {of}, 0 to 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a fraction of {of}, 0 to 1")
    return float(value)


def check_limits(lr_limits: object) -> tuple[float, float]:
    """Return the lowest and the highest learning rate.

    Raises:
        ValueError: if they do not bound anything.
    """
    limits = tuple(lr_limits) if isinstance(lr_limits, (tuple, list)) else ()
    if len(limits) != 2 or not all(map(is_number, limits)) or not 0 < limits[0] <= limits[1] < math.inf:
        raise ValueError(
            f"lr_limits={lr_limits!r}: give the lowest and the highest learning rate, 0 < lowest <= highest, "
            "both finite"
        )
    return float(limits[0]), float(limits[1])


def check_scalar(name: str, value: object) -> float:
    """Return a real number, or the one element of a tensor, as Python's.

    Raises:
        TypeError: if it is neither.
        ValueError: if the tensor has not one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {list(value.shape)}: give one number, as {name}.mean()")
        value = value.detach().item()
    if not is_number(value):
        raise TypeError(f"{name}={value!r}: expected a real number, or a tensor of one")
    return float(value)  # type: ignore[arg-type]
