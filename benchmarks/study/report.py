"""The tables and the picture of the study: ``python -m benchmarks.study.report``."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from autolr_fast.demo import BASELINES

from .grid import BATCH_SIZES, LENGTHS, STARTS, TUNED
from .methods import METHODS, OPTIMIZERS
from .slices import RESULTS, read
from .tasks import TASKS

Row = Mapping[str, Any]
_COMMAND = "python -m benchmarks.study --images DIR --text FILE; python -m benchmarks.study.report"
_DRAWN = ("AutoLR", "cosine", "one cycle", "D-Adaptation", "Prodigy", "Schedule-Free", "DoG", "SaLSA")
_CLOSE = 1.0  # point of accuracy, or % of the loss
_LOST = {"accuracy": 0.0, "loss": math.inf}
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#999999")


class Outcome:
    """What a method reaches on a task with an optimizer, from each start: the median over the seeds.

    Attributes:
        by_start: lr0 -> result.
        spread: lr0 -> (lowest, highest) over the seeds.
        extra: median share by which the scheduler lengthens the training.
        seeds: how many there are of the start with the fewest.
    """

    def __init__(self, rows: Sequence[Row]):
        lost = _LOST[TASKS[rows[0]["task"]].measure]
        results: dict[float, list[float]] = {}
        for row in sorted(rows, key=lambda row: row["lr"]):
            results.setdefault(row["lr"], []).append(lost if row["result"] is None else row["result"])
        self.by_start = {lr: statistics.median(values) for lr, values in results.items()}
        self.seeds = min(len(values) for values in results.values())
        self.spread = {lr: (min(values), max(values)) for lr, values in results.items()}
        self.extra = statistics.median(row["scheduling"] / (row["seconds"] - row["scheduling"]) for row in rows)


Found = Mapping[tuple[str, str, str], Outcome]
"""(task, optimizer, method) -> outcome."""


def outcomes(rows: Iterable[Row], batch_size: int = 0, length: int = 1) -> dict[tuple[str, str, str], Outcome]:
    """Return the outcome of each (task, optimizer, method) with a batch size (0 for the task's) and a length."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["length"] == length and row["batch_size"] == batch_size:
            grouped.setdefault((row["task"], row["optimizer"], row["method"]), []).append(row)
    return {key: Outcome(of_key) for key, of_key in grouped.items()}


def best(task: str, results: Mapping[float, float]) -> tuple[float, float]:
    """Return the start with the best result, and that."""
    choose = max if TASKS[task].measure == "accuracy" else min
    lr = choose(results, key=results.__getitem__)
    return lr, results[lr]


def gain(task: str, result: float, reference: float) -> float:
    """Return by how much a result is better than another: points of accuracy, or % of the loss."""
    if TASKS[task].measure == "accuracy":
        return result - reference
    return -math.inf if math.isinf(result) else 100 * (1 - result / reference)


def table(found: Found, optimizer: str, methods: Sequence[str]) -> list[str]:
    """Return the table of an optimizer: a line a method, a column a task.

    A cell is the gain over the best tuned cosine: the median over the starts, the worst and the best of them, and
    how many decades of starts are close to that cosine or better.
    """
    tasks = [task for task in TASKS if (task, optimizer, "cosine") in found]
    tuned = {task: best(task, _tuned(found[task, optimizer, "cosine"])) for task in tasks}
    heads = [f"{task}: {tuned[task][1]:.4g} at {tuned[task][0]:g}" for task in tasks]
    lines = [f"| {optimizer} | {' | '.join(heads)} | extra time | seeds |", "|---" * (len(tasks) + 3) + "|"]
    for method in methods:
        cells, extra, seeds = [], [], []
        for task in tasks:
            outcome = found.get((task, optimizer, method))
            if outcome is None:
                cells.append("")
                continue
            extra.append(outcome.extra)
            seeds.append(outcome.seeds)
            starts = _tuned(outcome) if method in BASELINES else outcome.by_start
            gains = {lr: gain(task, result, tuned[task][1]) for lr, result in starts.items()}
            middle, worst, highest = statistics.median(gains.values()), min(gains.values()), max(gains.values())
            close = [lr for lr, of_lr in gains.items() if of_lr >= -_CLOSE]
            decades = math.log10(max(close) / min(close)) if close else 0.0
            cells.append(f"{middle:+.1f} ({worst:+.1f} .. {highest:+.1f}), {decades:.1f}")
        if extra:
            lines.append(f"| {method} | {' | '.join(cells)} | {statistics.median(extra):.0%} | {min(seeds)} |")
    return lines


def settings_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of other batch sizes and lengths: a line a task and optimizer, a column a setting.

    A cell is AutoLR's gain over the best cosine schedule of the same setting, the median over the starts, and its
    extra time. Where one of the two was not run, it is empty.
    """
    asked = {f"batches of {size}": {"batch_size": size} for size in BATCH_SIZES}
    asked |= {f"{length} x as long": {"length": length} for length in LENGTHS}
    columns = {name: outcomes(rows, **setting) for name, setting in asked.items()}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for task, optimizer in itertools.product(TASKS, OPTIMIZERS):
        cells = []
        for found in columns.values():
            auto, cosine = (found.get((task, optimizer, method)) for method in ("AutoLR", "cosine"))
            if auto is None or cosine is None:
                cells.append("")
                continue
            _, reference = best(task, cosine.by_start)
            middle = statistics.median(gain(task, result, reference) for result in auto.by_start.values())
            cells.append(f"{middle:+.1f}, {auto.extra:.0%}")
        if any(cells):
            lines.append(f"| {task}, {optimizer} | {' | '.join(cells)} |")
    return lines


def extra_table(found: Found) -> list[str]:
    """Return the table of the time that AutoLR adds to a training: a line an optimizer, a column a task."""
    lines = [f"| | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    for optimizer in OPTIMIZERS:
        cells = (found.get((task, optimizer, "AutoLR")) for task in TASKS)
        lines.append(f"| {optimizer} | {' | '.join(f'{cell.extra:.0%}' if cell else '' for cell in cells)} |")
    return lines


def _tuned(outcome: Outcome) -> dict[float, float]:
    return {lr: result for lr, result in outcome.by_start.items() if lr in TUNED}


def figure(found: Found, methods: Sequence[str]) -> Figure:
    """Draw the result over where the learning rate starts: a row an optimizer, a column a task, a line a method.

    A line is the median over the seeds, within their range.
    """
    drawn = Figure(figsize=(3 * len(TASKS), 2.6 * len(OPTIMIZERS)), layout="constrained")
    grid = drawn.subplots(len(OPTIMIZERS), len(TASKS), squeeze=False, sharex=True, sharey="col")
    for (row, optimizer), (column, (name, task)) in itertools.product(
        enumerate(OPTIMIZERS), enumerate(TASKS.items())
    ):
        axes = grid[row][column]
        for method, colour in zip(methods, _COLOURS, strict=False):
            if outcome := found.get((name, optimizer, method)):
                lrs = list(outcome.by_start)
                axes.plot(lrs, list(outcome.by_start.values()), color=colour, label=method, marker=".")
                lowest, highest = zip(*outcome.spread.values(), strict=True)
                axes.fill_between(lrs, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axes.set_title(f"{task.title}\n({'accuracy, %' if task.measure == 'accuracy' else 'loss'})", fontsize=8)
        if row == len(OPTIMIZERS) - 1:
            axes.set_xlabel("lr0")
        if column == 0:
            axes.set_ylabel(optimizer)
    for column, (name, task) in enumerate(TASKS.items()):
        results = [o.by_start.values() for (of, _, method), o in found.items() if of == name and method in methods]
        finite = sorted(result for each in results for result in each if math.isfinite(result))
        if not finite:
            continue
        if task.measure == "accuracy":  # what matters is near the best
            grid[0][column].set_ylim(finite[len(finite) // 4] - 3, finite[-1] + 1)
        else:
            grid[0][column].set_ylim(0.97 * finite[0], 1.5 * finite[len(finite) // 2])
    labelled = {}  # not every method is in every panel
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    drawn.legend(labelled.values(), labelled.keys(), loc="outside upper center", ncols=len(labelled), frameon=False)
    return drawn


def page(rows: Sequence[Row], found: Found, methods: Sequence[str]) -> str:
    """Return the page of the study."""
    lines = [
        "# From any start, against the best of a grid",
        "",
        "Gain over the best cosine schedule of a grid of nine rates (3e-4 .. 3), in points of accuracy or % of the "
        "loss: the median over the starts (the worst .. the best of them), each the median over the seeds; then "
        "from the lowest to the highest start that gives at most one point or one % less, in decades. In the head "
        "of a column stands that best cosine and its rate; its own line is what the grid as a whole gives. AutoLR "
        f"starts from {', '.join(f'{lr:g}' for lr in STARTS)}, and with one thing changed from 1e-4 and 1. Extra "
        "time is what the scheduler adds to the training.",
        "",
    ]
    for optimizer in OPTIMIZERS:
        lines += [*table(found, optimizer, methods), ""]
    lines += ["## The time that AutoLR adds", "", *extra_table(found), ""]
    lines += ["## Other batches, longer trainings", ""]
    lines += ["The median gain over the best cosine schedule of the same setting, and the extra time.", ""]
    lines += [*settings_table(rows), ""]
    lines += ["## The tasks", "", "| task | | steps | batch size |", "|---|---|---|---|"]
    lines += [f"| {name} | {task.title} | {task.steps} | {task.batch_size} |" for name, task in TASKS.items()]
    lines += ["", f"`{_COMMAND}`", "", f"{'; '.join(_machines(rows))}. Seeds from 0 on."]
    lines += ["", "![Results over lr0](study.png)"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.report", description="Write tables and picture."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory with runs.jsonl (%(default)s)")
    args = parser.parse_args(argv)
    rows = read(args.results / "runs.jsonl")
    if not rows:
        parser.error(f"--results {args.results}: there is no runs.jsonl; python -m benchmarks.study writes it")
    found = outcomes(rows)
    methods = [method for method in METHODS if any(method == of for _, _, of in found)]
    (args.results / "study.md").write_text(page(rows, found, methods), encoding="utf-8")
    drawn = [method for method in methods if method in _DRAWN]
    picture = figure(found, drawn)
    picture.supxlabel(f"{_COMMAND}\n{'; '.join(_machines(rows))}", fontsize=7, color="0.4")
    picture.savefig(args.results / "study.png", dpi=110)
    for name in ("study.md", "study.png"):
        print(f"wrote {args.results / name}")


def _machines(rows: Sequence[Row]) -> list[str]:
    return sorted({row["machine"] for row in rows})


if __name__ == "__main__":
    main()
