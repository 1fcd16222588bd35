"""Why the level stays where it does: ``python -m benchmarks.study.heat --images DIR --text FILE``.

It writes ``results/study/heat.png``. The panels of the first row, one an optimizer, show trainings under the cosine
schedule, which does not listen, from ``results/study/signals.jsonl.xz``. A line is a task, over the rate that
the schedule starts from. It shows the heat in the second quarter of the training, in units of the gain. A dot is
filled where the result is within two points or two percent of the best that the task has with the optimizer. The
grey line is AutoLR's limit.

The second row is one training by AutoLR, while it probes: the level, the heat in units of the gain, and the gain.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autolr_fast import AutoLR
from autolr_fast._level.heat import Heat

from ..paper.data import DataError
from ..paper.train import CACHE
from ..saving import save
from .data import Places, batch
from .grid import GROUPS
from .methods import OPTIMIZERS
from .outcomes import Row, gain
from .slices import RESULTS, read
from .tasks import TASKS
from .training import Cell, set_up

__all__ = ["Point", "main", "panel", "trajectory"]

_COMMAND = "python -m benchmarks.study.heat"
_LIMIT = 0.3  # AutoLR's default
_QUARTER = 1
_CLOSE = 2.0  # points of accuracy, or % of the loss
_LOWEST = 1e-3  # ratio that is drawn
_STARTS = (1e-4, 1.0)


class Point(NamedTuple):
    """What AutoLR knows after a probe.

    Attributes:
        step: optimizer steps done.
        level: of the learning rate.
        ratio: the median heat in units of the gain.
        gain: by how much the mean loss falls in a doubling of the steps.
    """

    step: int
    level: float
    ratio: float
    gain: float


def panel(rows: Sequence[Row]) -> Mapping[str, list[tuple[float, float, bool]]]:
    """Return what a panel shows of an optimizer: task -> (rate, ratio, whether the result is close to the best).

    Args:
        rows: of one optimizer. Ratios and results are medians over the seeds; rates without a ratio are left out.
    """
    shown = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task and row["result"] is not None]
        ratios, results = (_medians(of_task, name) for name in ("ratio", "result"))
        if not ratios:
            continue
        choose = max if TASKS[task].measure == "accuracy" else min
        best = choose(results.values())
        shown[task] = [(lr, ratios[lr], gain(task, results[lr], best) >= -_CLOSE) for lr in sorted(ratios)]
    return shown


def _medians(rows: Sequence[Row], name: str) -> dict[float, float]:
    """Return the median over the seeds, by rate, of what there is."""
    values: dict[float, list[float]] = {}
    for row in rows:
        value = row["ratios"][_QUARTER] if name == "ratio" else row["result"]
        if value is not None:
            values.setdefault(row["lr"], []).append(value)
    return {lr: statistics.median(of_lr) for lr, of_lr in values.items()}


def trajectory(cell: Cell, places: Places) -> list[Point]:
    """Train by AutoLR, and return what it knew after each probe that had a heat to go by."""
    task, data, model, training, size, total = set_up(cell, places)
    (scheduler,) = training.schedulers
    assert isinstance(scheduler, AutoLR)
    points: list[Point] = []
    known = Heat(_LIMIT, torch.device("cpu"))
    for step in range(total):
        training.step(partial(task.loss, model, *batch(data, step, size, cell.seed)))
        if scheduler.last_probe is None or scheduler.last_probe.step != step + 1:
            continue
        state = scheduler.state_dict()["level"]["heat"]
        heats = [heat for heat in state["heats"] if math.isfinite(heat)]
        known.load(state)
        if heats and known.gain > 0:
            gained = known.gain.item()
            points.append(Point(step + 1, scheduler.level[0], statistics.median(heats) / gained, gained))
    return points


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Draw what holds the level.")
    add = parser.add_argument
    add("--images", type=Path, help="as in python -m benchmarks.study")
    add("--text", type=Path, help="as in python -m benchmarks.study")
    add("--cache", type=Path, default=CACHE, help="of what is pretrained (%(default)s)")
    add("--task", choices=TASKS, default="transformer", help="that AutoLR trains (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="momentum", help="of that training (%(default)s)")
    add("--results", type=Path, default=RESULTS, help="directory with signals.jsonl.xz (%(default)s)")
    args = parser.parse_args(argv)
    rows = read(args.results / "signals.jsonl.xz")
    if not rows:
        parser.error(f"--results {args.results}: no signals.jsonl.xz; python -m benchmarks.study.signals writes it")
    if (place := TASKS[args.task].place) and getattr(args, place) is None:
        parser.error(f"--{place} is needed for {args.task}: give it, or another --task")
    places = Places(args.images, args.cache, args.text)
    try:
        runs = {lr: trajectory(Cell(args.task, args.optimizer, "AutoLR", lr, seed=0), places) for lr in _STARTS}
    except (DataError, OSError) as error:
        parser.error(str(error))
    picture = figure(rows, runs, f"{args.task}, {args.optimizer}")
    picture.supxlabel(f"{_COMMAND}   (torch {torch.__version__})", fontsize=7, color="0.4")
    save(picture, args.results / "heat.png", dpi=110)
    print(f"wrote {args.results / 'heat.png'}")


def figure(rows: Sequence[Row], runs: Mapping[float, Sequence[Point]], name: str) -> Figure:
    """Draw both rows.

    Args:
        rows: of signals.jsonl.xz.
        runs: of AutoLR, by where the learning rate starts.
        name: of what they train.
    """
    drawn = Figure(figsize=(16, 9), layout="constrained")
    above, below = drawn.subplots(2, len(OPTIMIZERS))
    tasks = [task for group in GROUPS.values() for task in group]
    labelled = {}
    for axes, optimizer in zip(above, OPTIMIZERS, strict=True):
        for task, dots in panel([row for row in rows if row["optimizer"] == optimizer]).items():
            colour = f"C{tasks.index(task) % 10}"
            rates, ratios = [lr for lr, *_ in dots], [max(ratio, _LOWEST) for _, ratio, _ in dots]
            style = "-" if tasks.index(task) < 10 else "--"
            (labelled[task],) = axes.plot(rates, ratios, color=colour, linestyle=style)
            faces = [colour if is_close else "white" for *_, is_close in dots]
            axes.scatter(rates, ratios, c=faces, edgecolors=colour, zorder=3)
        _finish(axes, "learning rate of the cosine schedule", "heat / gain", f"{optimizer}; filled: good results")
        axes.set_xscale("log")
        axes.axhline(_LIMIT, color="0.5", linewidth=1)
    shown = [task for task in tasks if task in labelled]
    drawn.legend([labelled[task] for task in shown], shown, loc="outside right upper", frameon=False, fontsize=8)
    for axes, attribute, label in zip(below, ("level", "ratio", "gain"), _LABELS, strict=True):
        for lr, points in runs.items():
            values = [getattr(point, attribute) for point in points]
            lowest = _LOWEST if attribute == "ratio" else 0.0
            axes.plot(
                [point.step for point in points], [max(value, lowest) for value in values], label=f"from {lr:g}"
            )
        _finish(axes, "step", label, f"AutoLR: {name}")
        axes.legend(frameon=False, fontsize=8)
    below[1].axhline(_LIMIT, color="0.5", linewidth=1)
    return drawn


_LABELS = ("level", "heat / gain", "gain in a doubling of the steps")


def _finish(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
