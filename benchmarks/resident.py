"""Resident memory of this process, on Linux."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["high_water", "in_use"]

_STATM, _STATUS = (Path("/proc/self") / name for name in ("statm", "status"))


def in_use() -> int:
    """Return the bytes that are resident now."""
    return int(_STATM.read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def high_water() -> int:
    """Return the most bytes that were ever resident."""
    # Not resource.getrusage: what a process was started by counts there.
    (line,) = (line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
