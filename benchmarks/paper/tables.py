"""The results of an experiment as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .data import CIFAR_10, name_of, suffix_of
from .experiments import EXPERIMENTS, SCALES, SOURCE, Experiment, arguments

__all__ = ["COLUMNS", "about", "command", "page"]

Rows = Sequence[Mapping[str, Any]]
_EMPTY = ""


def page(name: str, rows: Mapping[str, Rows], data: str) -> str:
    """Return the page of an experiment: a table for each scale that was run, and one to be filled for the full one.

    Args:
        name: of the experiment.
        rows: of each scale.
        data: digest of the data set that all of them are of.
    """
    experiment = EXPERIMENTS[name]
    lines = [f"# {experiment.title}, {name_of(data)}", "", experiment.question, ""]
    lines += ["Mean ± standard deviation over the seeds."]
    if "best validation" in experiment.columns:
        lines[-1] += (
            " Accuracy and loss are those of the test images at the end; the best validation accuracy is that of "
            "the best moment, which flatters what goes up and down."
        )
    if any(column.startswith("lr ") for column in experiment.columns):
        lines[-1] += (
            " A learning rate is the geometric mean of the steps since the validation before, and of the seeds "
            "(lowest .. highest)."
        )
    for scale, of_scale in rows.items():
        if not of_scale and scale != "full":
            continue
        lines += ["", f"## {scale.capitalize()} scale", "", *_table(experiment, scale, of_scale, data), ""]
        lines += [f"`{command(name, scale)}`", ""]
        lines += about(of_scale) if of_scale else ["Not run yet: that command fills this table, on a GPU."]
        lines += [f"Every run: `{' '.join(arguments(SCALES[scale]))}`."]
        if of_scale:
            lines += ["", f"![{experiment.title}, {scale} scale]({name}{suffix_of(data)}.{scale}.png)"]
    return "\n".join(lines) + "\n"


def command(name: str, scale: str) -> str:
    """Return the command that makes the results."""
    return f"python -m benchmarks.paper {name} --scale {scale} --data DIR"


def about(rows: Rows) -> list[str]:
    """Return where rows were measured, and on what."""
    first = rows[0]
    machines = sorted({
        f"{row['machine']}, {row['threads']} thread{'s' * (row['threads'] > 1)} a run, "
        + ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        for row in rows
    })  # fmt: skip
    seeds = sorted({row["seed"] for row in rows})
    return [
        f"{name_of(first['data'])}: {first['train_images']:,} images to train on, "
        f"{first['validation_images']:,} to validate with, {first['test_images']:,} to test on; "
        f"{first['parameters']:,} parameters, "
        f"{first['total_steps']:,} steps of {first['total_steps'] // first['steps_per_epoch']} epochs, "
        f"seeds {', '.join(map(str, seeds))}. {'; '.join(machines)}."
    ]


def _table(experiment: Experiment, scale: str, rows: Rows, data: str) -> list[str]:
    known = SOURCE if data == CIFAR_10 else {}
    titles = [f"{column}, {scale} scale" if column == "accuracy" else column for column in experiment.columns]
    titles = ["source's accuracy, its own scale" if title == "source" else title for title in titles]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for setting in experiment.settings:
        of_setting = [row for row in rows if row["setting"] == setting.label]
        cells = []
        for column in experiment.columns:
            if column == "source":
                cells.append(f"{known[setting.label]:.1f} %" if setting.label in known else _EMPTY)
            else:
                cells.append(COLUMNS[column](of_setting, rows) if of_setting else _EMPTY)
        lines.append(f"| {setting.label} | {' | '.join(cells)} |")
    return lines


def _mean(values: Sequence[float | None], form: str, unit: str = "") -> str:
    """Return mean and deviation; none where a value is missing."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return _EMPTY if not there else f"{_mean(there, form, unit)} ({len(there)} of {len(values)})"
    spread = f" ± {statistics.stdev(there):{form}}" if len(there) > 1 else ""
    return f"{statistics.fmean(there):{form}}{spread}{unit}"


def _rate(rates: Sequence[float]) -> str:
    spread = f" ({min(rates):.2g} .. {max(rates):.2g})" if len(rates) > 1 else ""
    return f"{statistics.geometric_mean(rates):.2g}{spread}"


def _after_an_epoch(row: Mapping[str, Any]) -> float:
    return next(point["lr"] for point in row["curve"] if point["epoch"] >= 1)


def _spent(row: Mapping[str, Any]) -> float:
    return row["seconds"]["training"] + row["seconds"]["probing"]


def _times_constant(rows: Rows, of_experiment: Rows) -> str:
    constant = {row["seed"]: _spent(row) for row in of_experiment if row["setting"] == "constant"}
    return _mean([_spent(row) / constant[row["seed"]] for row in rows if row["seed"] in constant] or [None], ".2f")


Column = Callable[[Rows, Rows], str]
COLUMNS: Mapping[str, Column] = {
    "accuracy": lambda rows, _: _mean([100 * row["test_accuracy"] for row in rows], ".1f", " %"),
    "best validation": lambda rows, _: _mean(
        [100 * max(point["validation_accuracy"] for point in row["curve"]) for row in rows], ".1f", " %"
    ),
    "loss": lambda rows, _: _mean([row["test_loss"] for row in rows], ".3f"),
    "lr after an epoch": lambda rows, _: _rate([_after_an_epoch(row) for row in rows]),
    "lr at the end": lambda rows, _: _rate([row["curve"][-1]["lr"] for row in rows]),
    "highest training loss": lambda rows, _: f"{max(row['highest_loss'] for row in rows):.3g}",
    "not finite": lambda rows, _: f"{sum(row['not_finite'] for row in rows)} of {len(rows)}",
    "move": lambda rows, _: _mean([row["move"] for row in rows], ".3f"),
    "follows the range": lambda rows, _: _mean([row["follows_range"] for row in rows], ".2f"),
    "seconds": lambda rows, _: _mean([_spent(row) for row in rows], ".0f"),
    "share in probes": lambda rows, _: _mean(
        [100 * row["seconds"]["probing"] / _spent(row) for row in rows], ".1f", " %"
    ),
    "times constant": _times_constant,
    "memory": lambda rows, _: _mean([row["memory"] / 2**20 for row in rows], ".0f", " MiB"),
    "seeds": lambda rows, _: str(len(rows)),
}
"""A cell from the rows of a setting and those of the whole experiment, by the title of its column."""
