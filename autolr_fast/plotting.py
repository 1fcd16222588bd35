"""Pictures of a run. Needs matplotlib: ``pip install 'autolr_fast[plot]'``."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ._tree import Branch, Epoch

__all__ = ["Curve", "plot_runs", "plot_tree"]


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
    if not curves:
        raise ValueError("curves=[] is empty: give at least one Curve")
    for curve in curves:
        if not len(curve.steps) == len(curve.lrs) == len(curve.losses) > 0:
            raise ValueError(
                f"curve {curve.label!r} has {len(curve.steps)} steps, {len(curve.lrs)} lrs and "
                f"{len(curve.losses)} losses: give one of each for every step"
            )
    figure, left, right = _two_panels(title, footer, xlabel="optimizer step")
    labels = list(dict.fromkeys(curve.label for curve in curves))
    highest_loss = 3 * max(curve.losses[0] for curve in curves)
    lowest_loss = 0.7 * min(value for curve in curves for value in curve.losses if value > 0)
    lowest_lr = min(curve.lrs[0] for curve in curves) / 100
    for curve in curves:
        index = labels.index(curve.label)
        if index == len(labels) - 1:
            style = _branch_style(is_best=True, survives=True)
        else:
            style = {"color": _COLORS[index % len(_COLORS)], "linewidth": 1.0, "alpha": 0.8}
        left.plot(curve.steps, curve.lrs, label=curve.label, **style)
        # A line that jumps off the panel says more than one that ends.
        finite = [value if isfinite(value) else 1e6 * highest_loss for value in curve.losses]
        right.plot(curve.steps, finite, **style)
    for axes in (left, right):
        axes.set(yscale="log")
        axes.margins(x=0.01)
    left.set(ylabel="learning rate", ylim=(lowest_lr, None))
    right.set(ylabel=loss, ylim=(lowest_loss, highest_loss))
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    return figure


def plot_tree(history: Sequence[Epoch], *, title: str, footer: str = "") -> Figure:
    """Draw a search over learning rates: every branch from its parent's rate to its own, and what losses they had.

    Pruned branches are faded, those that went on are drawn through, and the line to the last best model stands out.
    A branch without a finite loss is a cross.

    Args:
        history: E epochs, as :attr:`autolr_fast.ALRTree.history` has them.
        title: over both panels.
        footer: small print under the panels.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: if there are no epochs.

    Example:
        >>> from autolr_fast._tree import Branch, Epoch
        >>> epoch = Epoch(1, (Branch(0, 0.2, 0.5), Branch(0, 0.05, 0.9)), survivors=(0,))
        >>> [axes.get_ylabel() for axes in plot_tree([epoch], title="one epoch").axes]
        ['learning rate', 'training loss']
    """
    if not history:
        raise ValueError("history=[] is empty: train an epoch first")
    figure, left, right = _two_panels(title, footer, xlabel="epoch")
    best = _line_to_the_best(history)
    beams: list[Branch] = []  # of the first epoch nothing is known
    for epoch, on_best in zip(history, best, strict=True):
        for index, branch in enumerate(epoch.branches):
            style = _branch_style(index == on_best, index in epoch.survivors)
            line = [beams[branch.parent], branch] if beams else [branch]
            x = range(epoch.number - len(line) + 1, epoch.number + 1)
            left.plot(x, [point.lr for point in line], marker="o", markersize=3, **style)
            if isfinite(branch.loss):
                right.plot(x, [point.loss for point in line], marker="o", markersize=3, **style)
            else:
                left.plot(epoch.number, branch.lr, marker="x", color=_HIGHLIGHT, zorder=4.0)
        beams = [epoch.branches[index] for index in epoch.survivors]
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set(ylabel="learning rate", yscale="log")
    positive = all(branch.loss > 0 for epoch in history for branch in epoch.branches if isfinite(branch.loss))
    right.set(ylabel="training loss", yscale="log" if positive else "linear")
    for label, is_best, survives in (("best", True, True), ("went on", False, True), ("pruned", False, False)):
        left.plot([], [], label=label, **_branch_style(is_best, survives))
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _two_panels(title: str, footer: str, xlabel: str) -> tuple[Figure, Any, Any]:
    """Return an empty figure, and its panels."""
    from matplotlib.figure import Figure  # noqa: PLC0415, an optional dependency

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set(xlabel=xlabel)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.supxlabel(footer, fontsize=7, color="0.4")
    return figure, left, right


def _line_to_the_best(history: Sequence[Epoch]) -> list[int]:
    """Return the index of the branch of each epoch that the last best one grew from, or is."""
    line = [history[-1].survivors[0]]
    for before, epoch in zip(reversed(history[:-1]), reversed(history[1:]), strict=True):
        line.append(before.survivors[epoch.branches[line[-1]].parent])
    return line[::-1]


def _branch_style(is_best: bool, survives: bool) -> dict[str, Any]:
    if is_best:
        return {"color": _HIGHLIGHT, "linewidth": 2.0, "zorder": 3.0}
    if survives:
        return {"color": _COLORS[2], "linewidth": 1.5, "zorder": 2.0}
    return {"color": _COLORS[0], "linewidth": 0.8, "alpha": 0.45}


_HIGHLIGHT = "#c1121f"
_COLORS = ("#8d99ae", "#4a7c59", "#3d5a80", "#7b5ea7", "#e09f3e")
