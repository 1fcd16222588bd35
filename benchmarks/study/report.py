"""The tables and the picture of the study: ``python -m benchmarks.study.report``."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from autolr_fast.demo import BASELINES

from .grid import (
    BATCH_SIZES,
    DETERMINISTIC,
    DROPOUT,
    FEW_STARTS,
    LENGTHS,
    PAIRED,
    REFERENCE,
    STARTED,
    STARTS,
    TUNED,
    UNGUARDED,
)
from .methods import AFTER_STEP, METHODS, MUON_AND_ADAMW, OPTIMIZERS
from .outcomes import Found, Outcome, Row, medians, noted, outcomes, with_error
from .slices import RESULTS, read
from .tasks import TASKS
from .variants import VARIANTS, method_with

_COMMAND = (
    "python -m benchmarks.study starts --seeds 5 --images DIR --text FILE; "
    "python -m benchmarks.study --images DIR --text FILE; python -m benchmarks.study.report"
)
_DRAWN = ("AutoLR", "cosine", "one cycle", "D-Adaptation", "Prodigy", "Schedule-Free", "DoG", "SaLSA")
_NOT_REPLAYED = (
    f"AutoLR, changed or not, is here `{REFERENCE}`: it has the closure after the step, and replays none."
)
_CLOSE = 1.0  # point of accuracy, or % of the loss
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#999999")


def table(found: Found, optimizer: str, methods: Sequence[str]) -> list[str]:
    """Return the table of an optimizer: a line a method, a column a task.

    A cell is the gain over the best tuned cosine: the median over the starts and its standard error, the worst and
    the best of the starts, and how many decades of starts are close to that cosine or better. The last is how many
    seeds there are, of the task with the fewest to that with the most.
    """
    tuned = {task: cosine for task in STARTED if (cosine := found.get((task, optimizer, "cosine")))}
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
            close = [lr for lr, of_lr in of_starts.items() if of_lr >= -_CLOSE]
            decades = math.log10(max(close) / min(close)) if close else 0.0
            cells.append(
                f"{with_error(gains)} "
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
    default = {task: outcome for task in DETERMINISTIC if (outcome := found.get((task, optimizer, REFERENCE)))}
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


def by_optimizer(cell: Callable[[str, str], str], tasks: Sequence[str] = STARTED) -> list[str]:
    """Return a table with a line an optimizer and a column a task.

    Args:
        cell: from task and optimizer to what stands there.
        tasks: that have a column.
    """
    lines = [f"| | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    lines += [
        f"| {optimizer} | {' | '.join(cell(task, optimizer) for task in tasks)} |" for optimizer in OPTIMIZERS
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
    for task, optimizer in itertools.product(DETERMINISTIC, OPTIMIZERS):
        cells = []
        for found in columns.values():
            auto, cosine = (found.get((task, optimizer, method)) for method in (REFERENCE, "cosine"))
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
            found.get((task, optimizer, method)) for method in (method_with("not guarded"), REFERENCE)
        )
        return noted(without.changes(default)) if without and default else ""

    return by_optimizer(cell, DETERMINISTIC)


def paired_table(found: Found) -> list[str]:
    """Return the table of two optimizers for one model; nothing if they were not run.

    It has AutoLR's gain from each start, the median over the seeds and its standard error; behind them stand the
    median and the worst of the starts.
    """
    auto, cosine = (found.get((PAIRED, MUON_AND_ADAMW, method)) for method in ("AutoLR", "cosine"))
    if auto is None or cosine is None:
        return []
    gains = auto.gains(cosine)
    of_starts = medians(gains)
    cells = [*(with_error({lr: by_seed}) for lr, by_seed in gains.items()), with_error(gains)]
    return [
        f"| {_head(cosine)} | {' | '.join(f'from {lr:g}' for lr in gains)} | median | worst |",
        "|---" * (len(gains) + 3) + "|",
        f"| AutoLR | {' | '.join(cells)} | {min(of_starts.values()):+.1f} |",
    ]


def replay_table(found: Found) -> list[str]:
    """Return the table of what it is worth that a probe has the step's dropout masks: a line an optimizer."""
    lines = ["| | gain | replayed | not |", "|---" * 4 + "|"]
    for optimizer in OPTIMIZERS:
        replayed, drawn = (found.get((DROPOUT, optimizer, method)) for method in ("AutoLR", AFTER_STEP))
        if replayed and drawn:
            results = [statistics.median(medians(each.results).values()) for each in (replayed, drawn)]
            reached = " | ".join(f"{result:.4g}" for result in results)
            lines.append(f"| {optimizer} | {noted(replayed.changes(drawn))} | {reached} |")
    return lines if len(lines) > 2 else []


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
    drawn = Figure(figsize=(3 * len(STARTED), 2.6 * len(OPTIMIZERS)), layout="constrained")
    grid = drawn.subplots(len(OPTIMIZERS), len(STARTED), squeeze=False, sharex=True, sharey="col")
    for (row, optimizer), (column, name) in itertools.product(enumerate(OPTIMIZERS), enumerate(STARTED)):
        task, axes = TASKS[name], grid[row][column]
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
    for column, name in enumerate(STARTED):
        results = [
            medians(o.results).values() for (of, _, method), o in found.items() if of == name and method in methods
        ]
        finite = sorted(result for each in results for result in each if math.isfinite(result))
        if not finite:
            continue
        if TASKS[name].measure == "accuracy":  # what matters is near the best
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
        "optimizer's step, a few microseconds and the copies of open windows, are not in it, nor is what it notes "
        "before the loss.",
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
        f"`benchmarks/study/variants.py`. {_NOT_REPLAYED}",
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
    lines += [
        f"The median gain over the best cosine schedule of the same setting, and the extra time. {_NOT_REPLAYED}",
        "",
    ]
    lines += [*settings_table(rows), ""]
    if paired := paired_table(found):
        lines += [
            "## Two optimizers for one model",
            "",
            f"The task {PAIRED}, by Muon for the matrices of the blocks and AdamW for the rest, with one learning "
            "rate: AutoLR's gain over the best cosine schedule by where it starts, in % of the loss, each run "
            "against that of the same seed: the median over the seeds and its standard error, then the median and "
            "the worst of the starts.",
            "",
            *paired,
            "",
        ]
    if replay := replay_table(found):
        lines += [
            "## Dropout's masks replayed, or not",
            "",
            "What AutoLR gains on a transformer with dropout, in % of the loss, where its probes have the masks of "
            "the step that they judge, over probes with masks of their own: each run against that of the same seed "
            f"and start ({', '.join(f'{lr:g}' for lr in FEW_STARTS)}), the mean over the seeds and its standard "
            "error; then the median loss with and without.",
            "",
            *replay,
            "",
        ]
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
