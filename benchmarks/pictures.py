"""The results as bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from autolr_fast._evaluators import EVALUATORS

from .baselines import BASELINES, REFERENCE
from .tables import Rows, source_over

__all__ = ["PICTURES", "memory", "probe", "tree"]

# One colour a method, in every picture.
_COLOURS = {"auto": "#111111", "inplace": "#56b4e9", "stacked": "#0072b2", "streamed": "#009e73",
            "graphed": "#e69f00", "batched": "#0072b2", "sequential": "#009e73",
            "deep copies": "#b0b0b0", REFERENCE: "#707070"}  # fmt: skip
_FLOOR = "N plain forwards"


def probe(header: Mapping[str, Any], rows: Rows) -> Figure:
    """Draw how many times as long the source's loop takes, at the largest N."""
    largest = max(row["n"] for row in rows)
    cases = [row for row in rows if row["n"] == largest and "ratio" in row]
    models = list(dict.fromkeys(row["model"] for row in cases))
    of_model = {model: [row for row in cases if row["model"] == model] for model in models}
    bars = {
        what: {row["model"]: source_over(row, of_model[row["model"]]) for row in cases if row["what"] == what}
        for what in (*EVALUATORS, *BASELINES)
        if what != REFERENCE
    }
    figure = _bars(models, bars, f"A probe of {largest} candidates", f"times as fast as the {REFERENCE}", header)
    axes = figure.axes[0]
    axes.axhline(1, color=_COLOURS[REFERENCE], linewidth=1)
    for place, model in enumerate(models):
        floor = source_over({"ratio": 1.0}, of_model[model])
        label = _FLOOR if place == 0 else None
        axes.hlines(floor, place - 0.45, place + 0.45, color="black", linestyles="dotted", label=label)
    axes.legend(frameon=False, fontsize=8)
    return figure


def memory(header: Mapping[str, Any], rows: Rows) -> Figure:
    """Draw what a later probe takes at its peak."""
    cases = [row for row in rows if "later" in row]
    models = list(dict.fromkeys(row["model"] for row in cases))
    bars = {
        what: {row["model"]: row["later"] for row in cases if row["what"] == what}
        for what in (*EVALUATORS, *BASELINES)
    }
    title = f"Memory of a probe of {cases[0]['n']} candidates, snapshot apart"
    return _bars(models, bars, title, "peak, in copies of the parameters", header)


def tree(header: Mapping[str, Any], rows: Rows) -> Figure:
    """Draw how many times as long one training after another takes, and the memory, over the number of branches."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for style, model in zip(
        ("solid", "dashed", "dotted"), dict.fromkeys(row["model"] for row in rows), strict=True
    ):
        for method in ("batched", "sequential"):
            of_method = [row for row in rows if (row["model"], row["what"]) == (model, method)]
            of_method.sort(key=lambda row: row["beams"] * row["n"])
            branches = [row["beams"] * row["n"] for row in of_method]
            line = {"color": _COLOURS[method], "linestyle": style, "marker": "o", "markersize": 4}
            left.plot(branches, [1 / row["ratio"] for row in of_method], label=f"{model}, {method}", **line)
            right.plot(branches, [row["peak"] for row in of_method], **line)
    left.axhline(1, color=_COLOURS[REFERENCE], linewidth=1)
    left.set(xlabel="branches", ylabel="times as fast as one training after another")
    right.set(xlabel="branches", ylabel="peak, in copies of the parameters")
    for axes in (left, right):
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle("A search over learning rates")
    _sign(figure, header)
    return figure


def _bars(
    groups: Sequence[str], bars: Mapping[str, Mapping[str, float]], title: str, unit: str, header: Mapping[str, Any]
) -> Figure:
    """Draw a bar for each name in each group that it has a value for."""
    bars = {name: values for name, values in bars.items() if values}
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.9 / len(bars)
    for position, (name, values) in enumerate(bars.items()):
        places = [groups.index(group) - 0.45 + (position + 0.5) * width for group in values]
        drawn = axes.bar(places, list(values.values()), 0.92 * width, color=_COLOURS[name], label=name)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    _sign(figure, header)
    return figure


def _sign(figure: Figure, header: Mapping[str, Any]) -> None:
    machine = header["machine"] if header["device"] == "cpu" else header["device"]
    figure.supxlabel(f"{header['command']}   ({machine}, {header['versions']})", fontsize=7)


PICTURES: Mapping[str, Callable[[Mapping[str, Any], Rows], Figure]] = {
    "probe": probe,
    "memory": memory,
    "tree": tree,
}
