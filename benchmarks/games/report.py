"""The page and the rows: ``results/games.md`` and ``results/games.json``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..report import RESULTS
from .players import AUTO, COSINE, METHODS
from .tasks import ADAPTERS, TASKS, without_numbers

__all__ = ["GRID", "STARTS", "page", "write"]

Rows = Sequence[Mapping[str, Any]]
STARTS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)
"""Where AutoLR starts on the adapters."""
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
"""Rates that the cosine schedule is tuned over on the adapters."""


def write(header: Mapping[str, Any], rows: Rows) -> None:
    """Write rows as JSON and as a page."""
    content = json.dumps({**header, "rows": rows}, indent=1)
    (RESULTS / "games.json").write_text(content + "\n", encoding="utf-8")
    (RESULTS / "games.md").write_text(page(header, rows), encoding="utf-8")


def page(header: Mapping[str, Any], rows: Rows) -> str:
    """Return the page."""
    lines = ["# Losses without a minimum", "", *(f"- {name}: {value}" for name, value in header.items())]
    lines += [
        "",
        "These losses have no minimum, or only the equilibrium of a game. Constant and cosine are Adam at the rate",
        "that is usual for the task. AutoLR starts from the same rate. Each player has its own optimizer and",
        "scheduler. A figure is the mean over the seeds and its standard error. A run is lost if its figure is not",
        "finite. A figure of the first table is the first one of its task.",
        "",
        *summary_table(rows),
    ]
    for name, task in TASKS.items():
        of_task = [row for row in rows if row["task"] == name]
        usual = [row for row in of_task if row["lr"] == task.lr]
        if usual:
            lines += ["", f"## {name}", "", task.about, f"The usual rate is {task.lr:g}. {_seconds(usual)}", ""]
            lines += figures_table(usual)
        if name == ADAPTERS and of_task:
            lines += [
                "",
                "The validation loss of AutoLR from any start, and of the cosine schedule from its rates:",
            ]
            lines += ["", *starts_table(of_task)]
    lines += ["", "## What AutoLR did with the rate", ""]
    lines += [
        "The level is the rate before annealing, in units of the start. Of each run the median over its steps, the",
        "highest and the last are taken. The table shows their medians over the seeds, and the lowest and the",
        "highest of the first. Probes that took steps again are the mean of a run.",
        "",
        *levels_table(rows),
        "",
        "## Warnings and errors",
        "",
        *warnings_list(rows),
    ]
    return "\n".join(lines) + "\n"


def summary_table(rows: Rows) -> list[str]:
    """Return a row for each task and a column for each method, at the usual rate."""
    lines = [f"| | figure | {' | '.join(METHODS)} |", "|---" * (2 + len(METHODS)) + "|"]
    for name, task in TASKS.items():
        usual = [row for row in rows if (row["task"], row["lr"]) == (name, task.lr)]
        figure = next((next(iter(row["figures"])) for row in usual if row["figures"]), "")
        cells = (with_error([row for row in usual if row["method"] == method]) for method in METHODS)
        if usual:
            lines.append(f"| {name} | {figure} | {' | '.join(cells)} |")
    return lines


def figures_table(rows: Rows) -> list[str]:
    """Return a row for each method and a column for each figure of one task."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for method in METHODS:
        of_method = [row for row in rows if row["method"] == method]
        if of_method:
            cells = (with_error(of_method, name) for name in names)
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def starts_table(rows: Rows) -> list[str]:
    """Return a column for each rate, of AutoLR's starts and of the cosine schedule's rates."""
    lrs = sorted({*STARTS, *GRID})
    lines = [f"| | {' | '.join(f'{lr:g}' for lr in lrs)} |", "|---" * (1 + len(lrs)) + "|"]
    for method in (AUTO, COSINE):
        cells = []
        for lr in lrs:
            cells.append(with_error([row for row in rows if (row["method"], row["lr"]) == (method, lr)]))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def levels_table(rows: Rows) -> list[str]:
    """Return a row for each task, start, method and player."""
    lines = [
        "| task | start | method | player | median (over seeds) | highest | last | retaken |",
        "|---" * 8 + "|",
    ]
    found: dict[tuple[str, float, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        for player in row["players"]:
            if "median" in player:
                found.setdefault((row["task"], row["lr"], row["method"], player["name"]), []).append(player)
    for (task, lr, method, name), players in found.items():
        middles, highest, last = ([player[key] for player in players] for key in ("median", "highest", "last"))
        spread = f"{statistics.median(middles):.3g} ({min(middles):.3g} .. {max(middles):.3g})"
        rest = f"{statistics.median(highest):.3g} | {statistics.median(last):.3g}"
        retaken = statistics.mean(player["retaken"] for player in players)
        lines.append(f"| {task} | {lr:g} | {method} | {name} | {spread} | {rest} | {retaken:.1f} |")
    return lines


def warnings_list(rows: Rows) -> list[str]:
    """Return each warning and error once for a task and a method, and of how many runs."""
    texts: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        raised = [f"raised {row['error']}"] if row["error"] else []
        for text in (*row["warnings"], *raised):
            texts.setdefault((row["task"], row["method"], without_numbers(text)), []).append(text)
    runs = [(row["task"], row["method"]) for row in rows]
    return [
        f"- {task}, {method}, {len(found)} of {runs.count((task, method))} runs: {' '.join(found[0].split())}"
        for (task, method, _), found in texts.items()
    ] or ["None."]


def with_error(rows: Rows, name: str | None = None) -> str:
    """Return the mean of a figure and its standard error, and of how many runs there is none.

    Args:
        rows: of one method.
        name: of the figure; the first one by default.
    """
    if not rows:
        return ""
    figures = [row["figures"] for row in rows if row["figures"]]
    values = [each[name or next(iter(each))] for each in figures]
    finite = [value for value in values if value is not None]
    missing = {"lost": len(values) - len(finite), "raised": len(rows) - len(values)}
    cells = [_mean(finite)] if finite else []
    return ", ".join([*cells, *(f"{count} of {len(rows)} {why}" for why, count in missing.items() if count)])


def _seconds(rows: Rows) -> str:
    """Return how long a run took."""
    return f"A run takes {statistics.median(row['seconds'] for row in rows):.1f} seconds."


def _mean(values: Sequence[float]) -> str:
    """Return the mean with three or four digits, and the error with as many places."""
    mean = statistics.mean(values)
    style = ".1e" if mean >= 1e4 else ".1f" if mean >= 10 or not mean else ".2f" if mean >= 1 else ".3f"
    if len(values) == 1:
        return f"{mean:{style}}"
    return f"{mean:{style}} ± {statistics.stdev(values) / math.sqrt(len(values)):{style}}"
