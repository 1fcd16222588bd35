"""The tables and the picture of the study: ``python -m benchmarks.study.report``."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from autolr_fast.demo import BASELINES

from .grid import BATCH_SIZES, FEW_STARTS, LENGTHS, STARTS, TUNED, UNGUARDED
from .methods import METHODS, OPTIMIZERS
from .slices import RESULTS, read
from .tasks import TASKS
from .variants import VARIANTS, method_with

Row = Mapping[str, Any]
_COMMAND = (
    "python -m benchmarks.study starts --seeds 5 --images DIR --text FILE; "
    "python -m benchmarks.study --images DIR --text FILE; python -m benchmarks.study.report"
)
_DRAWN = ("AutoLR", "cosine", "one cycle", "D-Adaptation", "Prodigy", "Schedule-Free", "DoG", "SaLSA")
_CLOSE = 1.0  # point of accuracy, or % of the loss
_LOST = {"accuracy": 0.0, "loss": math.inf}
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#999999")


class Outcome:
    """What a method reaches on a task with an optimizer.

    Attributes:
        results: lr0 -> seed -> result.
        training: lr0 -> median training loss of the last tenth.
        extra: median share by which the scheduler lengthens the training.
        seeds: how many there are of the start with the fewest, of schedules among those that they are tuned over.
    """

    def __init__(self, rows: Sequence[Row]):
        self.task: str = rows[0]["task"]
        lost = _LOST[TASKS[self.task].measure]
        self.results: dict[float, dict[int, float]] = {}
        self.training: dict[float, float] = {}
        for lr, of_lr in _by_start(rows):
            self.results[lr] = {row["seed"]: lost if row["result"] is None else row["result"] for row in of_lr}
            losses = [math.inf if row["loss"] is None else row["loss"] for row in of_lr]
            self.training[lr] = statistics.median(losses)
        tuned = rows[0]["method"] in BASELINES
        self.seeds = min(len(by_seed) for lr, by_seed in self.results.items() if lr in TUNED or not tuned)
        self.extra = statistics.median(row["scheduling"] / (row["seconds"] - row["scheduling"]) for row in rows)

    def best(self, without: int | None = None) -> tuple[float, float]:
        """Return the start with the best median among those that a schedule is tuned over, and that.

        Args:
            without: a seed that has no say.
        """
        choose = max if TASKS[self.task].measure == "accuracy" else min
        tuned = {
            lr: statistics.median(result for seed, result in by_seed.items() if seed != without)
            for lr, by_seed in self.results.items()
            if lr in TUNED
        }
        lr = choose(tuned, key=tuned.__getitem__)
        return lr, tuned[lr]

    def gains(self, tuned: Outcome, held_out: bool = False) -> Gains:
        """Return by how much each run is better than the run of the same seed from the best start of another.

        Args:
            tuned: the other.
            held_out: whether the seed that is compared has no say in which start is the best.
        """
        if held_out:
            common = set.intersection(*(set(by_seed) for lr, by_seed in tuned.results.items() if lr in TUNED))
            references = {seed: tuned.results[tuned.best(seed)[0]][seed] for seed in common}
        else:
            references = tuned.results[tuned.best()[0]]
        return {
            lr: {seed: gain(self.task, by_seed[seed], references[seed]) for seed in by_seed if seed in references}
            for lr, by_seed in self.results.items()
        }

    def changes(self, other: Outcome) -> Gains:
        """Return by how much each run is better than another's of the same seed from the same start."""
        return {
            lr: {seed: gain(self.task, by_seed[seed], theirs[seed]) for seed in by_seed if seed in theirs}
            for lr, by_seed in self.results.items()
            if (theirs := other.results.get(lr))
        }


def _by_start(rows: Sequence[Row]) -> list[tuple[float, list[Row]]]:
    ordered = sorted(rows, key=itemgetter("lr"))
    return [(lr, list(of_lr)) for lr, of_lr in itertools.groupby(ordered, itemgetter("lr"))]


Gains = Mapping[float, Mapping[int, float]]
"""lr0 -> seed -> gain."""
Found = Mapping[tuple[str, str, str], Outcome]
"""(task, optimizer, method) -> outcome."""


def outcomes(rows: Iterable[Row], batch_size: int = 0, length: int = 1) -> dict[tuple[str, str, str], Outcome]:
    """Return the outcome of each (task, optimizer, method) with a batch size (0 for the task's) and a length."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["length"] == length and row["batch_size"] == batch_size:
            grouped.setdefault((row["task"], row["optimizer"], row["method"]), []).append(row)
    return {key: Outcome(of_key) for key, of_key in grouped.items()}


def gain(task: str, result: float, reference: float) -> float:
    """Return by how much a result is better than another: points of accuracy, or % of the loss."""
    if TASKS[task].measure == "accuracy":
        return result - reference
    return -math.inf if math.isinf(result) else 100 * (1 - result / reference)


def medians(by_start: Mapping[float, Mapping[int, float]]) -> dict[float, float]:
    """Return the median over the seeds, of results or gains, by lr0."""
    return {lr: statistics.median(by_seed.values()) for lr, by_seed in by_start.items()}


def of_seeds(gains: Gains) -> list[float]:
    """Return the median over the starts, of each seed that all of them have."""
    seeds = set.intersection(*(set(by_seed) for by_seed in gains.values())) if gains else set()
    return [statistics.median(by_seed[seed] for by_seed in gains.values()) for seed in seeds]


def error(gains: Gains) -> float | None:
    """Return the standard error, over the seeds, of the median over the starts; none of less than three seeds."""
    middles = of_seeds(gains)
    if len(middles) < 3 or not all(map(math.isfinite, middles)):
        return None
    return statistics.stdev(middles) / math.sqrt(len(middles))


def table(found: Found, optimizer: str, methods: Sequence[str]) -> list[str]:
    """Return the table of an optimizer: a line a method, a column a task.

    A cell is the gain over the best tuned cosine: the median over the starts and its standard error, the worst and
    the best of the starts, and how many decades of starts are close to that cosine or better. The last is how many
    seeds there are, of the task with the fewest to that with the most.
    """
    tuned = {task: found[task, optimizer, "cosine"] for task in TASKS if (task, optimizer, "cosine") in found}
    heads = [_head(cosine) for cosine in tuned.values()]
    lines = [f"| {optimizer} | {' | '.join(heads)} | extra time | seeds |", "|---" * (len(tuned) + 3) + "|"]
    for method in methods:
        of_method = {task: found[task, optimizer, method] for task in tuned if (task, optimizer, method) in found}
        if not of_method:
            continue
        cells = []
        for task, cosine in tuned.items():
            if task not in of_method:
                cells.append("")
                continue
            gains = of_method[task].gains(cosine)
            if method in BASELINES:
                gains = {lr: by_seed for lr, by_seed in gains.items() if lr in TUNED}
            of_starts = medians(gains)
            noise = error(gains)
            close = [lr for lr, of_lr in of_starts.items() if of_lr >= -_CLOSE]
            decades = math.log10(max(close) / min(close)) if close else 0.0
            cells.append(
                f"{statistics.median(of_starts.values()):+.1f}{'' if noise is None else f' ± {noise:.1f}'} "
                f"({min(of_starts.values()):+.1f} .. {max(of_starts.values()):+.1f}), {decades:.1f}"
            )
        extra = statistics.median(outcome.extra for outcome in of_method.values())
        seeds = sorted({outcome.seeds for outcome in of_method.values()})
        span = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        lines.append(f"| {method} | {' | '.join(cells)} | {extra:.0%} | {span} |")
    return lines


def _head(tuned: Outcome) -> str:
    lr, result = tuned.best()
    return f"{tuned.task}: {result:.4g} at {lr:g}{', the end of the grid' if lr in (TUNED[0], TUNED[-1]) else ''}"


def variants_table(found: Found, optimizer: str) -> list[str]:
    """Return the table of AutoLR with one thing changed: a line a change, a column a task.

    A cell is the gain over AutoLR unchanged. The last one is the time that it adds, in units of what AutoLR
    unchanged adds to the same tasks.
    """
    default = {task: found[task, optimizer, "AutoLR"] for task in TASKS if (task, optimizer, "AutoLR") in found}
    lines = [f"| {optimizer} | {' | '.join(default)} | time |", "|---" * (len(default) + 2) + "|"]
    for name in VARIANTS:
        changed = {
            task: outcome for task in default if (outcome := found.get((task, optimizer, method_with(name))))
        }
        if changed:
            cells = [noted(changed[task].changes(default[task])) if task in changed else "" for task in default]
            extra = statistics.median(outcome.extra / default[task].extra for task, outcome in changed.items())
            lines.append(f"| {name} | {' | '.join(cells)} | {extra:.2g} |")
    return lines


def noted(gains: Gains) -> str:
    """Return the mean over the seeds of the median over the starts, and its standard error or how many seeds.

    It is bold if it is more than two errors from nothing, and empty if no seed has all starts.
    """
    of_each = of_seeds(gains)
    if not of_each:
        return ""
    mean, noise = statistics.mean(of_each), error(gains)
    if noise is not None:
        mark = "**" if abs(mean) > 2 * noise else ""
        return f"{mark}{mean:+.1f} ± {noise:.1f}{mark}"
    if math.isinf(mean):
        return f"**{mean:+.1f}**"
    return f"{mean:+.1f} ({len(of_each)} seed{'s' * (len(of_each) > 1)})"


def by_optimizer(cell: Callable[[str, str], str]) -> list[str]:
    """Return a table with a line an optimizer and a column a task.

    Args:
        cell: from task and optimizer to what stands there.
    """
    lines = [f"| | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    lines += [
        f"| {optimizer} | {' | '.join(cell(task, optimizer) for task in TASKS)} |" for optimizer in OPTIMIZERS
    ]
    return lines


def held_out_table(found: Found) -> list[str]:
    """Return the table of what AutoLR gains over rates that were chosen by other seeds."""

    def cell(task: str, optimizer: str) -> str:
        auto, cosine = found.get((task, optimizer, "AutoLR")), found.get((task, optimizer, "cosine"))
        if auto is None or cosine is None or min(auto.seeds, cosine.seeds) < 3:
            return ""
        return noted(auto.gains(cosine, held_out=True))

    return by_optimizer(cell)


def training_table(found: Found) -> list[str]:
    """Return the table of training losses: AutoLR's, the lowest of the cosine's grid, that of its best result."""

    def cell(task: str, optimizer: str) -> str:
        auto, cosine = found.get((task, optimizer, "AutoLR")), found.get((task, optimizer, "cosine"))
        if auto is None or cosine is None:
            return ""
        lowest = min(loss for lr, loss in cosine.training.items() if lr in TUNED)
        chosen = cosine.training[cosine.best()[0]]
        return f"{statistics.median(auto.training.values()):.3g}, {lowest:.3g}, {chosen:.3g}"

    return by_optimizer(cell)


def settings_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of other batch sizes and lengths: a line a task and optimizer, a column a setting.

    A cell is AutoLR's gain over the best cosine schedule of the same setting, the median over the starts, and its
    extra time. Where one of the two was not run, it is empty.
    """
    asked: dict[str, dict[str, int]] = {f"batches of {size}": {"batch_size": size} for size in BATCH_SIZES}
    asked |= {f"{length} x as long": {"length": length} for length in LENGTHS}
    columns = {name: found for name, setting in asked.items() if (found := outcomes(rows, **setting))}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for task, optimizer in itertools.product(TASKS, OPTIMIZERS):
        cells = []
        for found in columns.values():
            auto, cosine = (found.get((task, optimizer, method)) for method in ("AutoLR", "cosine"))
            if auto is None or cosine is None:
                cells.append("")
                continue
            middle = statistics.median(medians(auto.gains(cosine)).values())
            cells.append(f"{middle:+.1f}, {auto.extra:.0%}")
        if any(cells):
            lines.append(f"| {task}, {optimizer} | {' | '.join(cells)} |")
    return lines


def unguarded_table(found: Found) -> list[str]:
    """Return the table of what AutoLR gains without a guard."""

    def cell(task: str, optimizer: str) -> str:
        without, default = (
            found.get((task, optimizer, method)) for method in (method_with("not guarded"), "AutoLR")
        )
        return noted(without.changes(default)) if without and default else ""

    return by_optimizer(cell)


def extra_table(found: Found) -> list[str]:
    """Return the table of the time that AutoLR adds to a training."""

    def cell(task: str, optimizer: str) -> str:
        auto = found.get((task, optimizer, "AutoLR"))
        return f"{auto.extra:.0%}" if auto else ""

    return by_optimizer(cell)


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
                middles = medians(outcome.results)
                axes.plot(middles.keys(), middles.values(), color=colour, label=method, marker=".")
                lowest, highest = ([end(by.values()) for by in outcome.results.values()] for end in (min, max))
                axes.fill_between(list(middles), lowest, highest, color=colour, alpha=0.2, linewidth=0)
        axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axes.set_title(f"{task.title}\n({'accuracy, %' if task.measure == 'accuracy' else 'loss'})", fontsize=8)
        if row == len(OPTIMIZERS) - 1:
            axes.set_xlabel("lr0")
        if column == 0:
            axes.set_ylabel(optimizer)
    for column, (name, task) in enumerate(TASKS.items()):
        results = [
            medians(o.results).values() for (of, _, method), o in found.items() if of == name and method in methods
        ]
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
    starts = ", ".join(f"{lr:g}" for lr in STARTS)
    lines = [
        "# From any start, against the best of a grid",
        "",
        "Gain over the best cosine schedule of a grid of nine rates (3e-4 .. 3), in points of accuracy or % of the "
        "loss, each run against that of the same seed: the median over the starts, its standard error over the "
        "seeds (a gain of less than two is noise), the worst .. the best of the starts, each the median over the "
        "seeds; then from the lowest to the highest start that gives at most one point or one % less, in decades. "
        "In the head of a column stands that best cosine and its rate; its own line is what the grid as a whole "
        f"gives. AutoLR starts from {starts}. Extra time is that of the scheduler's step; its hooks in the "
        "optimizer's step, a few microseconds and the copies of open windows, are not in it.",
        "",
    ]
    for optimizer in OPTIMIZERS:
        lines += [*table(found, optimizer, methods), ""]
    lines += [
        "## Against a rate that was not chosen on the same seeds",
        "",
        "The best of nine rates is flattered by the runs that chose it. Here the cosine schedule of a seed has the "
        "rate that is best on the other seeds, as for somebody who tunes once and trains again. AutoLR's gain: the "
        "median over the starts, then the mean over the seeds (the median, above) and its standard error. Bold is "
        "a difference of more than two errors.",
        "",
        *held_out_table(found),
        "",
        "## With one thing changed",
        "",
        "What AutoLR gains by a change: each run against that of the default with the same seed and start "
        f"({', '.join(f'{lr:g}' for lr in FEW_STARTS)}), in points of accuracy or % of the loss, the mean over the "
        "seeds and its standard error. Bold is a difference of more than two errors. Time is what it adds, in "
        "units of what the default adds to the same tasks. What each change is says "
        "`benchmarks/study/variants.py`.",
        "",
    ]
    for optimizer in OPTIMIZERS:
        lines += [*variants_table(found, optimizer), ""]
    lines += ["What the guard is for shows elsewhere.", ""]
    for name, setting in UNGUARDED.items():
        lines += [f"What is gained without one {name}:", "", *unguarded_table(outcomes(rows, **setting)), ""]
    lines += [
        "## What it looks at: the training loss",
        "",
        "Of the last tenth of the steps: AutoLR's (median over the starts and seeds), the lowest that the cosine "
        "schedule has from any rate of the grid, and that from the rate that is best by the measure above.",
        "",
        *training_table(found),
        "",
    ]
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
    there = {method for _, _, method in found} - set(map(method_with, VARIANTS))
    methods = [method for method in METHODS if method in there]
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
