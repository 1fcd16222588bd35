"""Checks of what AutoLR is given: an error names the argument, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["check_count", "check_fraction", "check_guard", "check_limits", "check_optimizer", "check_windows"]


def check_optimizer(optimizer: object) -> None:
    """Raise a TypeError or ValueError if the steps of an optimizer cannot be scaled."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r}: expected a torch.optim.Optimizer; the closure goes to step(), "
            "as in AutoLR(optimizer, model) and scheduler.step(closure)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its step is a whole search of its own, which its lr does not "
            "scale; use it without AutoLR (line_search_fn='strong_wolfe'), or another optimizer"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "optimizer has differentiable=True, and its step becomes part of an autograd graph that writing "
            "candidates would break; build it with differentiable=False"
        )
    if len({bool(group.get("maximize", False)) for group in optimizer.param_groups}) > 1:
        raise ValueError(
            "optimizer has maximize=True in some param groups only: one closure cannot be both better higher and "
            "better lower; negate the loss of one part instead"
        )


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


def check_windows(window: int | Sequence[int]) -> tuple[int, ...]:
    """Return one window or several as a tuple.

    Raises:
        TypeError: if one is not a whole number.
        ValueError: if there is none, or one is less than 1.
    """
    windows = tuple(window) if isinstance(window, Sequence) else (window,)
    if not windows:
        raise ValueError(f"window={window!r} is empty: give one number of optimizer steps, or several")
    for count in windows:
        check_count("window", count, at_least=1)
    return windows


def check_guard(guard: int, settles: bool, total_steps: int | None) -> None:
    """Raise a TypeError or ValueError if so many probes cannot guard, or plateaus are not seen or not needed."""
    check_count("guard", guard, at_least=0, of="probes")
    if guard == 1:
        raise ValueError("guard=1: one probe has no standard error; give 2 or more, or 0 for no guard")
    if settles and guard == 0:
        raise ValueError("guard=0 sees no plateau, and anneal='plateau' needs to: give 2 or more probes")
    if settles and total_steps is not None:
        raise ValueError(
            f"total_steps={total_steps} with anneal='plateau', which is for trainings whose length is not known: "
            "leave total_steps out, or anneal by 'cosine'"
        )


def check_limits(min_lr: float, max_lr: float) -> None:
    """Raise a ValueError if two learning rates do not bound anything."""
    limits = (min_lr, max_lr)
    if not all(isinstance(limit, (int, float)) for limit in limits) or not 0 < min_lr <= max_lr < math.inf:
        raise ValueError(f"min_lr={min_lr!r}, max_lr={max_lr!r}: need numbers, 0 < min_lr <= max_lr, both finite")
