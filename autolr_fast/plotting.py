"""Pictures of a run. Needs matplotlib: ``pip install 'autolr_fast[plot]'``."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "plot_runs"]


class Curve(NamedTuple):
    """What one run did, at S moments of its training.

    Attributes:
        label: the method; runs of one label share a colour.
        steps: S optimizer steps, ascending.
        lrs: S learning rates.
        losses: S losses.
    """

    label: str
    steps: Sequence[int]
    lrs: Sequence[float]
    losses: Sequence[float]


def plot_runs(curves: Sequence[Curve], *, title: str, loss: str = "validation loss", footer: str = "") -> Figure:
    """Draw learning rate and loss over steps, a panel each and a line a run; the last label stands out.

    What leaves a panel: losses that are not finite or over three times the first, at the top; learning rates
    below a hundredth of the lowest start, at the bottom.

    Args:
        curves: runs, in the order of the legend.
        title: over both panels.
        loss: what the losses are.
        footer: small print under the panels.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: if there are no curves, or a curve has not as many learning rates or losses as steps.

    Example:
        >>> curve = Curve("AutoLR", steps=[0, 1], lrs=[1e-3, 2e-3], losses=[1.0, 0.5])
        >>> [axes.get_ylabel() for axes in plot_runs([curve], title="two steps").axes]
        ['learning rate', 'validation loss']
    """
    from matplotlib.figure import Figure  # noqa: PLC0415, an optional dependency

    if not curves:
        raise ValueError("curves=[] is empty: give at least one Curve")
    for curve in curves:
        if not len(curve.steps) == len(curve.lrs) == len(curve.losses) > 0:
            raise ValueError(
                f"curve {curve.label!r} has {len(curve.steps)} steps, {len(curve.lrs)} lrs and "
                f"{len(curve.losses)} losses: give one of each for every step"
            )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    highest_loss = 3 * max(curve.losses[0] for curve in curves)
    lowest_loss = 0.7 * min(value for curve in curves for value in curve.losses if value > 0)
    lowest_lr = min(curve.lrs[0] for curve in curves) / 100
    for curve in curves:
        index = labels.index(curve.label)
        if index == len(labels) - 1:
            style = {"color": _HIGHLIGHT, "linewidth": 2.0, "zorder": 3.0}
        else:
            style = {"color": _COLORS[index % len(_COLORS)], "linewidth": 1.0, "alpha": 0.8}
        left.plot(curve.steps, curve.lrs, label=curve.label, **style)
        # A line that jumps off the panel says more than one that ends.
        finite = [value if isfinite(value) else 1e6 * highest_loss for value in curve.losses]
        right.plot(curve.steps, finite, **style)
    for axes in (left, right):
        axes.set(xlabel="optimizer step", yscale="log")
        axes.margins(x=0.01)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(ylabel="learning rate", ylim=(lowest_lr, None))
    right.set(ylabel=loss, ylim=(lowest_loss, highest_loss))
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.supxlabel(footer, fontsize=7, color="0.4")
    return figure


_HIGHLIGHT = "#c1121f"
_COLORS = ("#8d99ae", "#4a7c59", "#3d5a80", "#7b5ea7", "#e09f3e")
