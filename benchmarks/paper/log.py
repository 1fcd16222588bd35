"""The log of a run: one JSON line for each step and each evaluation."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from autolr_fast import Probe

__all__ = ["Log", "RunError", "mark"]


class RunError(Exception):
    """What was asked for cannot be run; says which argument or file, and what to do."""


class Log:
    """A file of JSON lines.

    Rows of steps wait in ``pending`` with their tensors, so that no step waits for its own loss.

    Args:
        path: of the file; made if it does not exist.
        length: bytes to keep of it.

    Raises:
        RunError: if it is shorter.
    """

    def __init__(self, path: Path, length: int):
        self.pending: list[dict[str, Any]] = []
        self._path = path
        path.touch()
        size = path.stat().st_size
        if size < length:
            raise RunError(
                f"{path} is {size} bytes long and was {length} when the checkpoint beside it was made: put back "
                "what was removed, or give another --out to start a new run"
            )
        os.truncate(path, length)

    def write(self, *rows: dict[str, Any]) -> None:
        """Write rows of plain values; numbers that are not finite become null."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)

    def flush(self) -> list[dict[str, Any]]:
        """Write the pending rows, of which there must be one, and return them."""
        rows, self.pending = self.pending, []
        losses = torch.stack([row["loss"] for row in rows]).tolist()
        for row, loss in zip(rows, losses, strict=True):
            row["loss"] = loss
            if "probe" in row:
                probe, start, end = row["probe"]
                row["probe"] = _probe_row(probe) | {"seconds": _seconds(start, end)}
        self.write(*rows)
        return rows

    def sync(self) -> int:
        """Bring what was written to the disk, and return its length in bytes."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def _probe_row(probe: Probe) -> dict[str, Any]:
    """Return the probe in plain values; there is one param group, and so one learning rate."""
    return {
        "step": probe.step,
        "window": probe.window,
        "factors": list(probe.factors),
        "losses": probe.losses.tolist(),
        "weights": probe.weights.tolist(),
        "factor": probe.factor.item(),
        "lr_before": probe.lr_before[0],
        "lr_after": probe.lr_after[0],
        "evaluator": probe.evaluator,
        "rounds": probe.rounds,
    }


def mark(device: torch.device) -> float | torch.cuda.Event:
    """Return a point in the device's time; on a GPU without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    return end - start


def _finite(value: Any) -> Any:
    """Return the value with None for every float that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
