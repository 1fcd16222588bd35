"""What is kept of a finished run: a row of plain values, from its log."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["summarize"]

Row = dict[str, Any]


def summarize(log: Path) -> Row:
    """Return a row for a finished run.

    Args:
        log: ``log.jsonl`` of ``benchmarks.paper.train``.

    Returns:
        What its header says of versions, device, data and sizes; ``test_accuracy`` (0 to 1) and ``test_loss``;
        ``highest_loss`` of the training, and ``not_finite``, whether one was not; ``seconds`` by kind; ``memory``
        in bytes; what :func:`_reaction` returns; and ``curve``, what :func:`_curve` returns.
    """
    header, *rows = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    test = rows[-1]
    steps = [row for row in rows if row["kind"] == "step"]
    finite = [row["loss"] for row in steps if row["loss"] is not None]
    kept = ("versions", "device", "threads", "data", "parameters", "train_images", "validation_images",
            "test_images", "steps_per_epoch", "total_steps")  # fmt: skip
    return {
        **{name: header[name] for name in kept},
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "highest_loss": max(finite, default=None),
        "not_finite": len(finite) < len(steps),
        "seconds": test["seconds"],
        "memory": test["memory"],
        **_reaction([row["probe"] for row in steps if "probe" in row]),
        "curve": list(_curve(rows, header["steps_per_epoch"])),
    }


def _curve(rows: Sequence[Row], steps_per_epoch: int) -> Iterable[Row]:
    """Return a row for each validation: the epochs done, its loss and accuracy, and how the training went.

    The latter is the mean training loss and the geometric mean of the learning rates, since the validation before.
    """
    steps: list[Row] = []
    for row in rows:
        if row["kind"] == "step":
            steps.append(row)
        elif row["kind"] == "validation":
            losses = [step["loss"] for step in steps]
            yield {
                "epoch": round(row["step"] / steps_per_epoch, 4),
                "validation_loss": row["loss"],
                "validation_accuracy": row["accuracy"],
                "training_loss": None if None in losses else statistics.fmean(losses),
                "lr": statistics.geometric_mean([step["lr"] for step in steps]),
            }
            steps = []


def _reaction(probes: Sequence[Row]) -> Row:
    """Return how many probes there were, how far they moved the rate, and whether the losses' range told them to.

    ``move`` is the mean of |log2 factor|. ``follows_range`` is the rank correlation, over the probes, of
    |log2 factor| with the range of the losses; none where either is always the same.
    """
    if not probes:
        return {}
    seen = [probe for probe in probes if None not in probe["losses"]]
    moves = [abs(math.log2(probe["factor"])) for probe in seen]
    ranges = [max(probe["losses"]) - min(probe["losses"]) for probe in seen]
    try:
        follows = statistics.correlation(_ranks(moves), _ranks(ranges))
    except statistics.StatisticsError:
        follows = None
    return {"probes": len(probes), "move": statistics.fmean(moves) if moves else None, "follows_range": follows}


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the place of each value, equal ones sharing the mean of theirs."""
    ordered = sorted(round(value, 12) for value in values)
    first: dict[float, int] = {}
    count: dict[float, int] = {}
    for place, value in enumerate(ordered):
        first.setdefault(value, place)
        count[value] = count.get(value, 0) + 1
    return [first[value] + (count[value] - 1) / 2 for value in (round(value, 12) for value in values)]
