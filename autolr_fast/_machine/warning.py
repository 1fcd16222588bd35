"""Warnings that show the user's own line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

__all__ = ["WarnOnce", "warn"]

_NOT_THE_USERS = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))


def warn(message: str) -> None:
    """Warn at the innermost line that is neither of this package nor of torch."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, UserWarning, stacklevel=depth + 1)


class WarnOnce:
    """Gives each warning once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, message: str) -> None:
        """Warn, if there is something to say that was not said before."""
        if message and message not in self._given:
            self._given.add(message)
            warn(message)
