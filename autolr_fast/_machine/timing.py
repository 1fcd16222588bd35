"""How long something takes, where that decides what runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

__all__ = ["seconds"]


def seconds(run: Callable[[], Tensor]) -> float:
    """Return how long a call takes once it is warm: the best of three, or the first of more than 0.1 s.

    Args:
        run: returns a tensor, which is waited for.
    """
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        run().tolist()  # waits for the device
        best = min(best, time.perf_counter() - start)
        if best > 0.1:
            break
    return best
