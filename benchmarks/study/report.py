"""The tables and the picture of the study: ``python -m benchmarks.study.report``."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..saving import save
from .grid import (
    BATCH_SIZES,
    DETERMINISTIC,
    DROPOUT,
    FEW_STARTS,
    FINE_TUNED,
    FROM_SCRATCH,
    GROUPS,
    LENGTHS,
    NOISY,
    PAIRED,
    SCHEDULES,
    STARTS,
    TUNED,
    WRONG_LABELS,
    trained_by,
)
from .methods import AFTER_STEP, HELD_BACK, METHODS, MUON_AND_ADAMW, OPTIMIZERS
from .outcomes import Found, Gains, Outcome, Row, error, medians, noted, of_seeds, outcomes, with_error
from .slices import RESULTS, read
from .tasks import TASKS
from .variants import VARIANTS, method_with

_COMMAND = "python -m benchmarks.study --images DIR --text FILE; python -m benchmarks.study.report"
_DRAWN = ("AutoLR", *SCHEDULES, "D-Adaptation", "Prodigy", "Schedule-Free", "DoG", "SaLSA")
_BLOCKS = (FROM_SCRATCH, (*NOISY, *FINE_TUNED))
"""Tasks of the picture, those of a row of panels each."""
_CLOSE = 1.0  # point of accuracy, or % of the loss
_FAR = 3.0
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#f0e442", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#999999")


def table(found: Found, tasks: Sequence[str]) -> list[str]:
    """Return the table of a group of tasks: a line a task and optimizer.

    It has the best rate of each schedule and the result from there; what AutoLR gains over the best cosine, and
    over the best of all schedules that were run; the time that it adds, and how many seeds are compared.
    """
    return _table(found, [(task, optimizer, "AutoLR") for task in tasks for optimizer in trained_by(task)])


def held_back_table(found: Found) -> list[str]:
    """Return the table of AutoLR with and without examples held back, where labels are wrong."""
    return _table(found, [(WRONG_LABELS, name, method) for name in OPTIMIZERS for method in ("AutoLR", HELD_BACK)])


def _table(found: Found, lines: Sequence[tuple[str, str, str]]) -> list[str]:
    run = [schedule for schedule in SCHEDULES if any(method == schedule for _, _, method in found)]
    heads = ["", *run, "over the best cosine", "over the best", "extra time", "seeds"]
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for task, optimizer, method in lines:
        tuned = _tuned(found, task, optimizer, SCHEDULES)
        auto = found.get((task, optimizer, method))
        if not tuned and auto is None:
            continue
        cells = [_best(tuned[schedule]) if schedule in tuned else "" for schedule in run]
        over = [_gains_over(auto, _tuned(found, task, optimizer, of)) for of in (("cosine",), SCHEDULES)]
        cells += [_with_starts(gains) if gains else "" for gains in over]
        cells += [f"{auto.extra:.0%}" if auto else "", f"{len(of_seeds(over[1]))}" if over[1] else ""]
        name = "" if method == "AutoLR" else f", {method.removeprefix('AutoLR, ')}"
        table.append(f"| {task}, {optimizer}{name} | {' | '.join(cells)} |")
    return table


def _tuned(found: Found, task: str, optimizer: str, schedules: Sequence[str]) -> dict[str, Outcome]:
    """Return the outcomes of those schedules that were run from a rate of their grid."""
    of_all = {schedule: found.get((task, optimizer, schedule)) for schedule in schedules}
    return {schedule: outcome for schedule, outcome in of_all.items() if outcome and outcome.is_tuned}


def _gains_over(auto: Outcome | None, tuned: Mapping[str, Outcome]) -> Gains:
    """Return the gains over the best of some schedules; none if nothing can be compared."""
    if auto is None or not tuned:
        return {}
    choose = max if TASKS[auto.task].measure == "accuracy" else min
    return auto.gains(choose(tuned.values(), key=lambda outcome: outcome.best()[1]))


def _best(tuned: Outcome) -> str:
    lr, result = tuned.best()
    end = " (the end)" if lr in (tuned.grid[0], tuned.grid[-1]) else ""
    return f"{lr:g}{end} of {sum(lr in tuned.grid for lr in tuned.results)}: {result:.4g}"


def _with_starts(gains: Gains) -> str:
    of_starts = medians(gains).values()
    return f"{with_error(gains)} ({min(of_starts):+.1f} .. {max(of_starts):+.1f})"


def count(found: Found, tasks: Sequence[str]) -> str:
    """Return in how many cells AutoLR is as good as the best cosine or one cycle, and where it is far below.

    A cell is a task and an optimizer. Where labels are wrong, it is AutoLR with examples held back.
    """
    reached, far, cells = 0, [], 0
    for task, optimizer in itertools.product(tasks, OPTIMIZERS):
        method = HELD_BACK if task == WRONG_LABELS else "AutoLR"
        gains = _gains_over(
            found.get((task, optimizer, method)), _tuned(found, task, optimizer, ("cosine", "one cycle"))
        )
        if gains:
            cells += 1
            middle = statistics.median(medians(gains).values())
            reached += middle >= -2 * (error(gains) or 0.0)
            far += [f"{task} with {optimizer} ({middle:+.1f})"] * (middle < -_FAR)
    return (
        f"In {reached} of {cells} cells the gain over the best cosine or one cycle is at least minus two standard "
        f"errors. Below -{_FAR:g}: {', '.join(far) or 'none'}."
    )


def others_table(found: Found, optimizer: str, methods: Sequence[str]) -> list[str]:
    """Return the table of other methods with an optimizer: a line a method, a column a task.

    A cell is the gain over the best cosine: the median over the grid and its standard error, the worst and the best
    rate, and how many decades of rates are close to that cosine or better.
    """
    tuned = {
        task: of_cosine["cosine"]
        for task in DETERMINISTIC
        if (of_cosine := _tuned(found, task, optimizer, ["cosine"]))
    }
    heads = [f"{task}, {_best(cosine)}" for task, cosine in tuned.items()]
    lines = [f"| {optimizer} | {' | '.join(heads)} |", "|---" * (len(tuned) + 1) + "|"]
    for method in methods:
        cells = []
        for task, cosine in tuned.items():
            outcome = found.get((task, optimizer, method))
            gains = outcome.gains(cosine) if outcome else {}
            gains = {lr: by_seed for lr, by_seed in gains.items() if lr in TUNED}
            close = [lr for lr, of_lr in medians(gains).items() if of_lr >= -_CLOSE]
            decades = math.log10(max(close) / min(close)) if close else 0.0
            cells.append(f"{_with_starts(gains)}, {decades:.1f}" if gains else "")
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def variants_table(found: Found, optimizer: str) -> list[str]:
    """Return the table of AutoLR with one thing changed: a line a change, a column a task.

    A cell is the gain over AutoLR unchanged. The last one is the time that it adds, in units of what AutoLR
    unchanged adds to the same tasks.
    """
    default = {task: outcome for task in DETERMINISTIC if (outcome := found.get((task, optimizer, "AutoLR")))}
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


def by_task(cell: Callable[[str, str], str]) -> list[str]:
    """Return a table with a line a task and a column an optimizer; no line of a task with nothing in it.

    Args:
        cell: from task and optimizer to what stands there.
    """
    lines = [f"| | {' | '.join(OPTIMIZERS)} |", "|---" * (len(OPTIMIZERS) + 1) + "|"]
    for task in itertools.chain(*GROUPS.values()):
        cells = [cell(task, optimizer) for optimizer in OPTIMIZERS]
        if any(cells):
            lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def held_out_table(found: Found) -> list[str]:
    """Return the table of what AutoLR gains over rates that were chosen by other seeds."""

    def cell(task: str, optimizer: str) -> str:
        auto, tuned = found.get((task, optimizer, "AutoLR")), _tuned(found, task, optimizer, ["cosine"])
        if auto is None or len(of_seeds(_gains_over(auto, tuned))) < 3:
            return ""
        return noted(auto.gains(tuned["cosine"], held_out=True))

    return by_task(cell)


def validation_table(found: Found) -> list[str]:
    """Return the table of the highest loss on the test examples early in AutoLR's trainings."""

    def cell(task: str, optimizer: str) -> str:
        auto = found.get((task, optimizer, "AutoLR"))
        if auto is None or auto.validation is None:
            return ""
        return (
            f"{'**' if auto.validation > 1.1 else ''}{auto.validation:.3g}{'**' if auto.validation > 1.1 else ''}"
        )

    return by_task(cell)


def training_table(found: Found) -> list[str]:
    """Return the table of training losses: AutoLR's, the lowest of the cosine's grid, that of its best result."""

    def cell(task: str, optimizer: str) -> str:
        auto, tuned = found.get((task, optimizer, "AutoLR")), _tuned(found, task, optimizer, ["cosine"])
        if auto is None or not tuned:
            return ""
        cosine = tuned["cosine"]
        lowest = min(loss for lr, loss in cosine.training.items() if lr in cosine.grid)
        chosen = cosine.training[cosine.best()[0]]
        return f"{statistics.median(auto.training.values()):.3g}, {lowest:.3g}, {chosen:.3g}"

    return by_task(cell)


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
            auto = found.get((task, optimizer, "AutoLR"))
            gains = _gains_over(auto, _tuned(found, task, optimizer, ["cosine"]))
            middle = statistics.median(medians(gains).values()) if gains else 0.0
            cells.append(f"{middle:+.1f}, {auto.extra:.0%}" if auto and gains else "")
        if any(cells):
            lines.append(f"| {task}, {optimizer} | {' | '.join(cells)} |")
    return lines


def paired_table(found: Found) -> list[str]:
    """Return the table of two optimizers for one model; nothing if they were not run.

    It has AutoLR's gain from each start, the median over the seeds and its standard error; behind them stand the
    median and the worst of the starts.
    """
    tuned = _tuned(found, PAIRED, MUON_AND_ADAMW, ["cosine"])
    gains = _gains_over(found.get((PAIRED, MUON_AND_ADAMW, "AutoLR")), tuned)
    if not gains:
        return []
    of_starts = medians(gains)
    cells = [*(with_error({lr: by_seed}) for lr, by_seed in gains.items()), with_error(gains)]
    return [
        f"| {PAIRED}, {_best(tuned['cosine'])} | {' | '.join(f'from {lr:g}' for lr in gains)} | median | worst |",
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


def figure(found: Found, methods: Sequence[str]) -> Figure:
    """Draw the result over where the learning rate starts: a panel a task and optimizer, a line a method.

    A line is the median over the seeds, within their range.
    """
    rows, columns = len(_BLOCKS) * len(OPTIMIZERS), max(map(len, _BLOCKS))
    drawn = Figure(figsize=(3 * columns, 2.6 * rows), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False, sharex=True)
    labelled = {}  # not every method is in every panel
    for (block, names), (row, optimizer) in itertools.product(enumerate(_BLOCKS), enumerate(OPTIMIZERS)):
        for name, axes in itertools.zip_longest(names, grid[len(OPTIMIZERS) * block + row]):
            if name is None or optimizer not in trained_by(name):
                axes.set_visible(False)
                continue
            task = TASKS[name]
            for method, colour in zip(_DRAWN, _COLOURS, strict=True):
                if method in methods and (outcome := found.get((name, optimizer, method))):
                    middles = medians(outcome.results)
                    (line,) = axes.plot(middles.keys(), middles.values(), color=colour, label=method, marker=".")
                    labelled[method] = line
                    lowest, highest = ([end(by.values()) for by in outcome.results.values()] for end in (min, max))
                    axes.fill_between(list(middles), lowest, highest, color=colour, alpha=0.2, linewidth=0)
            axes.set_xscale("log")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{name}, {optimizer}\n({_UNITS[task.measure]})", fontsize=8)
            axes.set_xlabel("lr0" if row == len(OPTIMIZERS) - 1 else "")
            axes.set_ylim(_range(found, name, methods))
    if shown := [method for method in _DRAWN if method in labelled]:
        handles = [labelled[method] for method in shown]
        drawn.legend(handles, shown, loc="outside upper center", ncols=len(shown), frameon=False)
    return drawn


_UNITS = {"accuracy": "accuracy, %", "loss": "loss"}


def _range(found: Found, name: str, methods: Sequence[str]) -> tuple[float, float] | None:
    """Return the results of a task that are worth seeing: those near the best, of all optimizers."""
    of_task = [outcome for (task, _, method), outcome in found.items() if task == name and method in methods]
    results = itertools.chain.from_iterable(medians(outcome.results).values() for outcome in of_task)
    finite = sorted(filter(math.isfinite, results))
    if not finite:
        return None
    if TASKS[name].measure == "accuracy":
        return finite[len(finite) // 4] - 3, finite[-1] + 1
    return 0.97 * finite[0], 1.5 * finite[len(finite) // 2]


def page(rows: Sequence[Row], found: Found, methods: Sequence[str]) -> str:
    """Return the page of the study."""
    lines = ["# From any start, against the best of tuned schedules", "", *_INTRODUCTION, ""]
    for title, tasks in GROUPS.items():
        lines += [f"## {title}", "", *table(found, tasks), "", count(found, tasks), ""]
    for title, text, tables in _sections(rows, found, methods):
        if any(len(each) > 2 for each in tables):
            lines += [f"## {title}", "", text, ""]
            lines += itertools.chain.from_iterable([*each, ""] for each in tables if len(each) > 2)
    lines += ["## The tasks", "", "| task | | steps | batch size |", "|---|---|---|---|"]
    lines += [f"| {name} | {task.title} | {task.steps} | {task.batch_size} |" for name, task in TASKS.items()]
    lines += ["", f"`{_COMMAND}`", "", f"{'; '.join(_machines(rows))}. Seeds from 0 on."]
    lines += ["", "![Results over lr0](study.png)"]
    return "\n".join(lines) + "\n"


_INTRODUCTION = [
    "Gains are in points of accuracy, or in % of the loss. Each run is compared with the run of the same seed.",
    "",
    "- A schedule's column has its best rate, of how many that were run, and the median result from there.",
    '- "The end" is an end of the grid.',
    f"- AutoLR starts from {', '.join(f'{lr:g}' for lr in STARTS)}. Its gain is the median over the starts.",
    "- Behind ± stands the standard error over the seeds: a gain of less than two is noise.",
    "- In brackets stand the worst and the best start, each the median over the seeds.",
    '- "The best" is the best of the schedules that were run, over the seeds of the one with the fewest.',
    "- Extra time is that of the scheduler's step. What its hooks add to the optimizer's step is not in it.",
]
_FEW = ", ".join(f"{lr:g}" for lr in FEW_STARTS)


def _sections(
    rows: Sequence[Row], found: Found, methods: Sequence[str]
) -> Iterator[tuple[str, str, Sequence[list[str]]]]:
    """Return title, text and tables of each section after the main tables."""
    yield (
        "Examples held back",
        "A fifth of the labels is wrong. AutoLR, held back, watches the loss of a tenth of the training examples. "
        "Its training stops when the rate has come to zero.",
        [held_back_table(found)],
    )
    yield (
        "The loss on test examples, early",
        "Its highest in the first fifth of AutoLR's trainings, over all starts and seeds, in units of that before "
        "training. Bold is more than 1.1.",
        [validation_table(found)],
    )
    yield (
        "Against a rate that was not chosen on the same seeds",
        "The best of a grid is flattered by the runs that chose it. Here the cosine schedule of a seed has the "
        "rate that is best on the other seeds. The gain is AutoLR's median over the starts, then the mean over the "
        "seeds and its standard error. Bold is a difference of more than two errors.",
        [held_out_table(found)],
    )
    yield (
        "With one thing changed",
        "What AutoLR gains by a change. Each run is compared with that of the default of the same seed and start "
        f"({_FEW}). A cell is the mean over the seeds and its standard error. Bold is a difference of more than "
        "two errors. Time is what AutoLR adds, in units of what the default adds to the same tasks. "
        "`benchmarks/study/variants.py` says what each change is.",
        [variants_table(found, optimizer) for optimizer in OPTIMIZERS],
    )
    yield (
        "Other methods",
        "The gain over the best cosine schedule: the median over the rates, the worst and the best rate. The last "
        "number is how many decades of rates are at most one point or % below that cosine. Optimizers that need no "
        "rate have one.",
        [
            others_table(
                found, optimizer, [each for each in methods if each not in ("AutoLR", HELD_BACK, AFTER_STEP)]
            )
            for optimizer in OPTIMIZERS
        ],
    )
    yield (
        "What it looks at: the training loss",
        "Of the last tenth of the steps: AutoLR's (median over the starts and seeds), the lowest that the cosine "
        "schedule has from any rate, and that from the rate with the best result.",
        [training_table(found)],
    )
    yield (
        "Other batches, longer trainings",
        "The median gain over the best cosine schedule of the same setting, and the extra time.",
        [settings_table(rows)],
    )
    yield (
        "Two optimizers for one model",
        f"The task {PAIRED}: Muon trains the matrices of the blocks and AdamW the rest, with one learning rate. A "
        "column is where AutoLR starts.",
        [paired_table(found)],
    )
    yield (
        "Dropout's masks replayed, or not",
        "A transformer with dropout. Probes have the masks of the step that they judge, or masks of their own. The "
        f"gain is over the latter, of the same seed and start ({_FEW}). Then stand the median losses.",
        [replay_table(found)],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.report", description="Write tables and picture."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory with runs.jsonl.xz (%(default)s)")
    args = parser.parse_args(argv)
    rows = read(args.results / "runs.jsonl.xz")
    if not rows:
        parser.error(f"--results {args.results}: there is no runs.jsonl.xz; python -m benchmarks.study writes it")
    found = outcomes(rows)
    there = {method for _, _, method in found} - set(map(method_with, VARIANTS))
    methods = [method for method in METHODS if method in there]
    (args.results / "study.md").write_text(page(rows, found, methods), encoding="utf-8")
    picture = figure(found, methods)
    picture.supxlabel(f"{_COMMAND}\n{'; '.join(_machines(rows))}", fontsize=7, color="0.4")
    save(picture, args.results / "study.png", dpi=110)
    for name in ("study.md", "study.png"):
        print(f"wrote {args.results / name}")


def _machines(rows: Sequence[Row]) -> list[str]:
    return sorted({row["machine"] for row in rows})


if __name__ == "__main__":
    main()
