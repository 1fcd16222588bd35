"""The results of an experiment as a picture: curves over the epochs, or bars of what was spent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .data import name_of
from .experiments import EXPERIMENTS, Setting
from .tables import about, command

__all__ = ["picture"]

Rows = Sequence[Mapping[str, Any]]
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#111111", "#999999", "#a6761d")
_QUANTITIES = {
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy, %",
    "lr": "learning rate",
}


def picture(name: str, scale: str, rows: Rows) -> Figure:
    """Draw an experiment.

    Args:
        name: of the experiment.
        scale: of the rows.
        rows: of its finished runs, at least one, on one data set.
    """
    experiment = EXPERIMENTS[name]
    figure = _cost(rows) if name == "cost" else _curves(experiment.settings, rows)
    figure.suptitle(f"{experiment.title}, {name_of(rows[0]['data'])} ({scale} scale)")
    figure.supxlabel(f"{command(name, scale)}\n{about(rows)[0]}", fontsize=7, color="0.4", wrap=True)
    return figure


def _curves(settings: Sequence[Setting], rows: Rows) -> Figure:
    """Draw a line a setting, the mean over its seeds within their range.

    A panel has a column, a quantity a row; if there is one panel, the quantities are beside each other.
    """
    panels = list(dict.fromkeys(setting.panel for setting in settings))
    names = dict.fromkeys(_name(setting) for setting in settings)
    colours = dict(zip(names, _COLOURS, strict=False))
    turned = len(panels) == 1
    shape = (1, len(_QUANTITIES)) if turned else (len(_QUANTITIES), len(panels))
    size = (13, 5) if turned else (max(10, 3.4 * len(panels)), 9)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(*shape, squeeze=False, sharex=True, sharey=False if turned else "row")
    for column, panel in enumerate(panels):
        of_panel = [setting for setting in settings if setting.panel == panel]
        for place, (quantity, title) in enumerate(_QUANTITIES.items()):
            axes = grid[0][place] if turned else grid[place][column]
            for setting in of_panel:
                runs = [row["curve"] for row in rows if row["setting"] == setting.label]
                if runs:
                    name = _name(setting)
                    _line(axes, runs, quantity, colours[name], name)
            axes.spines[["top", "right"]].set_visible(False)
            if quantity != "validation_accuracy":
                axes.set_yscale("log")
            if quantity == "validation_loss":
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            if turned or column == 0:
                axes.set_ylabel(title)
            if turned or place == len(_QUANTITIES) - 1:
                axes.set_xlabel("epoch")
        first = grid[0][0] if turned else grid[0][column]
        first.set_title(panel, fontsize=10)
        handles, labels = first.get_legend_handles_labels()
        if turned:
            figure.legend(handles, labels, loc="outside right center", frameon=False)
        else:
            grid[1][column].legend(handles, labels, frameon=False, fontsize=8)
    return figure


def _name(setting: Setting) -> str:
    """Return the label without what the title of the panel says; a name has one colour in all panels."""
    return setting.label.removeprefix(setting.panel).lstrip(",: ")


def _line(axes: Axes, runs: Sequence[Any], quantity: str, colour: str, label: str) -> None:
    scale = 100 if quantity == "validation_accuracy" else 1
    epochs = [point["epoch"] for point in runs[0]]
    values = [[math.nan if v is None else scale * v for v in column] for column in _columns(runs, quantity)]
    mean = statistics.geometric_mean if quantity == "lr" else statistics.fmean
    axes.plot(epochs, [mean(column) for column in values], color=colour, label=label, linewidth=1.6)
    axes.fill_between(
        epochs,
        [min(column) for column in values],
        [max(column) for column in values],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )


def _columns(runs: Sequence[Any], quantity: str) -> Sequence[Sequence[float | None]]:
    """Return the values of all runs at each validation."""
    return list(zip(*([point[quantity] for point in run] for run in runs), strict=True))


def _cost(rows: Rows) -> Figure:
    """Draw a bar a setting: what was spent in training, and in probes."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    labels = list(dict.fromkeys(row["setting"] for row in rows))
    for place, label in enumerate(labels):
        of_setting = [row for row in rows if row["setting"] == label]
        training, probing = (
            statistics.fmean(row["seconds"][kind] for row in of_setting) for kind in ("training", "probing")
        )
        left.barh(place, training, color="#b0b0b0", label="training" if place == 0 else None)
        left.barh(place, probing, left=training, color="#d55e00", label="probes" if place == 0 else None)
        left.text(training + probing, place, f" {probing / (training + probing):.0%}", va="center", fontsize=9)
        memory = statistics.fmean(row["memory"] for row in of_setting) / 2**20
        right.barh(place, memory, color="#56b4e9")
        right.text(memory, place, f" {memory:.0f}", va="center", fontsize=9)
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    left.set_xlabel("seconds a run, and the share of probes")
    right.set_xlabel("peak memory, MiB")
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    return figure
