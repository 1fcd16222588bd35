"""Pictures of a run. Needs matplotlib: ``pip install 'autolr_fast[plot]'``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .probe import Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ._tree import Branch, Epoch
    from .scheduler import AutoLR

__all__ = ["Curve", "plot", "plot_runs", "plot_tree"]


def plot(
    run: AutoLR | Sequence[Probe],
    *,
    group: int = 0,
    probe: int | None = None,
    title: str = "What AutoLR did",
    footer: str = "",
) -> Figure:
    """Draw a run: learning rate and level over optimizer steps, where steps were probed, and what one probe saw.

    The level moves at probes alone. The learning rate is the level annealed, and is drawn up to the last step.
    Bands show the calibration, and where no more probes come. A small panel shows the losses of one probe along its
    line, and the factor that was chosen. Learning rates below a hundredth of the lowest level leave the picture.

    A history alone knows the learning rates just before and after its probes. Its picture joins these by straight
    lines, ends at the last probe, and has no bands.

    Args:
        run: the scheduler, whose run is drawn as far as it has come; or a history, such as one read from a file.
        group: index of the param group, of all optimizers together.
        probe: index into the history of the probe in the small panel; by default the last.
        title: over the picture.
        footer: small print under it.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        TypeError: if ``run`` is neither an AutoLR nor a sequence of probes.
        ValueError: if there are no probes, or none with such an index or of such a group, if the steps of a history
            do not ascend, or if the rate of the group is 0.

    Examples:
        >>> import torch
        >>> from autolr_fast import AutoLR
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        >>> scheduler = AutoLR(optimizer, model, total_steps=40)
        >>> for _ in range(40):
        ...     optimizer.zero_grad()
        ...     loss = scheduler.loss(lambda: (model(torch.ones(8, 4)) - 1).square().mean())
        ...     loss.backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> figure = plot(scheduler, title="forty steps")
        >>> [text.get_text() for text in figure.axes[1].get_legend().get_texts()][:3]
        ['learning rate', 'level, before annealing', 'probe']
        >>> [text.get_text() for text in plot(scheduler.history).axes[1].get_legend().get_texts()][:3]
        ['learning rate', 'level, before annealing', 'probe']
    """
    history = _history_of(run)
    scheduler = None if isinstance(run, Sequence) else run
    groups = len(scheduler.level) if scheduler else max(len(each.level_after) for each in history)
    probes = _probes_of(history, group, groups)
    shown = _chosen(history, probe)
    figure, axes, key, small = _panel_with_inset(title, footer)

    rates, levels = _trace(scheduler, probes, group) if scheduler else _known(history, probes, group)
    size = min(4.0, max(1.0, 40 / len(probes) ** 0.5))  # the more probes, the finer
    line = {"drawstyle": "steps-post", "linewidth": 0.5 + size / 3}  # a rate holds until the next step
    style = line if scheduler else {**line, "drawstyle": "default"}
    axes.plot(*zip(*rates, strict=True), label="learning rate", color=_HIGHLIGHT, zorder=3.0, **style)
    label = "level, before annealing"
    axes.plot(*zip(*levels, strict=True), label=label, color=_COLORS[2], zorder=2.5, **line)
    _mark_probes(axes, probes, shown, group, size)
    if scheduler:
        _shade_bands(axes, scheduler)
    lowest = max(min(rate for _, rate in rates), min(level for _, level in levels) / 100)
    highest = max(value for _, value in (*rates, *levels))
    if not lowest > 0:
        raise ValueError(f"group={group} has a level of {lowest:g}, which no logarithmic axis shows: give another")
    margin = max(1.2, (highest / lowest) ** 0.06)
    name = "learning rate" + f" of param group {group}" * (groups > 1)
    axes.set(xlabel="optimizer step", ylabel=name, yscale="log", ylim=(lowest / margin, highest * margin))
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    key.legend(*axes.get_legend_handles_labels(), loc="upper left", borderaxespad=0.0, frameon=False, fontsize=9)
    _draw_line_of(small, shown)
    return figure


class Curve(NamedTuple):
    """Holds one run at S moments of its training, for `plot_runs`.

    Attributes:
        label: the method; runs of one label share a colour.
        steps: S optimizer steps, ascending.
        lrs: S learning rates.
        losses: S losses.

    Examples:
        >>> Curve("AutoLR", steps=[0, 1], lrs=[1e-3, 2e-3], losses=[1.0, 0.5]).label
        'AutoLR'
    """

    label: str
    steps: Sequence[int]
    lrs: Sequence[float]
    losses: Sequence[float]


def plot_runs(curves: Sequence[Curve], *, title: str, loss: str = "validation loss", footer: str = "") -> Figure:
    """Draw learning rate and loss over steps, a panel each and a line a run; the last label stands out.

    Losses that are not finite or over three times the first leave the panel at the top. Learning rates below a
    hundredth of the lowest start leave it at the bottom.

    Args:
        curves: runs, in the order of the legend.
        title: over both panels.
        loss: the name of the losses.
        footer: small print under the panels.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: if there are no curves, or a curve has not as many learning rates or losses as steps.

    Examples:
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
        history: E epochs, as ``ALRTree.history`` has them.
        title: over both panels.
        footer: small print under the panels.

    Returns:
        A figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: if there are no epochs.

    Examples:
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


_Line: TypeAlias = list[tuple[int, float]]
"""A value of one param group after each of some numbers of optimizer steps."""


def _history_of(run: AutoLR | Sequence[Probe]) -> Sequence[Probe]:
    """Return the probes of a run; there is one at least, and a history is returned as it is."""
    history = run if isinstance(run, Sequence) else getattr(run, "history", None)
    if history is None or not all(isinstance(each, Probe) for each in history):
        raise TypeError(
            f"run={run!r:.60} is neither an AutoLR nor its history: give the scheduler, scheduler.history, or what "
            "Probe.from_dict made of each plain probe"
        )
    if not history:
        raise ValueError(
            "the history is empty: train a step first, its loss by scheduler.loss(closure), and call "
            "scheduler.step() after it"
        )
    for before, after in pairwise(history):
        if after.step <= before.step:
            raise ValueError(
                f"the history has a probe of step {after.step} after one of step {before.step}: give the probes of "
                "one run, in the order of their steps"
            )
    return history


def _probes_of(history: Sequence[Probe], group: int, groups: int) -> list[Probe]:
    """Return the probes that moved a param group; there is one at least."""
    if not 0 <= group < groups:
        raise ValueError(f"group={group} is not the index of one of {groups} param groups: give 0 to {groups - 1}")
    probes = [each for each in history if group < len(each.level_after)]
    if not probes:
        raise ValueError(f"group={group} was added after the last probe: draw it when a probe has moved it")
    return probes


def _chosen(history: Sequence[Probe], probe: int | None) -> Probe:
    """Return the probe of an index, or the last."""
    many = len(history)
    index = many - 1 if probe is None else probe
    if not -many <= index < many:
        raise ValueError(f"probe={probe} is not in the history, which has {many}: give {-many} to {many - 1}")
    return history[index]


def _known(history: Sequence[Probe], probes: Sequence[Probe], group: int) -> tuple[_Line, _Line]:
    """Return rates and levels of a param group just before and after its probes."""
    rates: _Line = []
    for each in probes:
        if each is not probes[0] or each is history[0]:  # before the first probe of a group, its rate means nothing
            rates.append((max(0, each.step - 1), float(each.lr_before[group])))
        rates.append((each.step, float(each.lr_after[group])))
    return rates, [(each.step, float(each.level_after[group])) for each in probes]


def _trace(scheduler: AutoLR, probes: Sequence[Probe], group: int) -> tuple[_Line, _Line]:
    """Return rates and levels of a param group: from the start if it was there, else from the first probe of it."""
    base, last, level = scheduler.base_lrs[group], scheduler.last_epoch, scheduler._level
    starts = [each.step for each in probes]
    levels = [float(each.level_after[group]) for each in probes]
    lrs = [float(each.lr_after[group]) for each in probes]
    if probes[0] is scheduler.history[0]:
        starts, levels, lrs = [0, *starts], [base, *levels], [base, *lrs]
    lowest, highest = (base * limit for limit in level.limits)

    def rate_at(step: int) -> float:
        since = bisect_right(starts, step) - 1
        if level.total_steps is None:  # between probes it stays
            return lrs[since]
        return min(max(levels[since] * level.multiplier(step), lowest), highest)

    first = starts[0]
    steps = sorted({first + round(n / 1000 * (last - first)) for n in range(1001)} | set(starts))
    return [(step, rate_at(step)) for step in steps], [*zip(starts, levels, strict=True), (last, levels[-1])]


def _mark_probes(axes: Any, probes: Sequence[Probe], shown: Probe, group: int, size: float) -> None:
    """Mark the levels that the probes left."""

    def mark(these: Sequence[Probe], label: str, **style: Any) -> None:
        if these:
            levels = [float(each.level_after[group]) for each in these]
            axes.plot([each.step for each in these], levels, linestyle="", label=label, **style)

    mark(probes, "probe", marker="o", markersize=size, color=_COLORS[2], zorder=4.0)
    retaken = [each for each in probes if each.retaken is not None]
    mark(retaken, "steps taken again", marker="v", markersize=7, color=_COLORS[3], zorder=4.5)
    ring = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": "0.1", "zorder": 5.0}
    mark([each for each in probes if each is shown], "probe shown below", marker="o", **ring)


def _shade_bands(axes: Any, scheduler: AutoLR) -> None:
    """Shade the steps that were calibrated, and those since the last probe if no more come."""
    last, schedule = scheduler.last_epoch, scheduler._tracker.schedule
    if schedule.first_steps:
        end = min(schedule.first_steps, last)
        axes.axvspan(0, end, label="calibration", color=_COLORS[4], alpha=0.22, linewidth=0.5)
    probed_until = max(schedule.first_steps, schedule.last_step if schedule.every_steps else 0)
    if scheduler._level.total_steps is not None and last > probed_until:
        start = scheduler.history[-1].step
        axes.axvspan(start, last, label="annealing alone", color=_COLORS[0], alpha=0.18, linewidth=0.5)


def _draw_line_of(axes: Any, probe: Probe) -> None:
    """Draw the losses that a probe saw over the factors, and the factor that it chose."""
    is_of_one_step = len(probe.factors) == 2 and min(probe.factors) == 0  # a search, which spans decades, has more
    pairs = zip(probe.factors, probe.losses.tolist(), strict=True)
    seen = sorted(pair for pair in pairs if pair[0] > 0 or is_of_one_step)
    finite = [(factor, loss) for factor, loss in seen if isfinite(loss)]
    others = [factor for factor, loss in seen if not isfinite(loss)]
    chosen = float(probe.factor)
    axes.axvline(chosen, color=_HIGHLIGHT, linewidth=1.5, linestyle="--")
    axes.plot(*zip(*finite, strict=True) if finite else ([], []), color=_COLORS[2], marker="o", markersize=4)
    axes.plot(others, [0.9] * len(others), "x", color=_HIGHLIGHT, transform=axes.get_xaxis_transform())
    axes.set(ylabel="loss", xlabel="factor" + " (a cross: loss not finite)" * bool(others))
    axes.set_xscale("linear" if is_of_one_step else "log")
    axes.margins(x=0.12, y=0.2)
    losses = [loss for _, loss in finite]
    if not finite:
        axes.set_yticks([])
    elif min(losses) > 0 and max(losses) > 100 * min(losses):
        axes.set_yscale("log")
    ticks = [factor for factor, _ in (seen if len(seen) <= 3 else (seen[0], seen[-1]))]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.set_title(f"probe at step {probe.step}: factor {chosen:.3g}", fontsize=9, loc="right")


def _panel_with_inset(title: str, footer: str) -> tuple[Figure, Any, Any, Any]:
    """Return an empty figure, its panel, and beside it the place of the legend and a small panel."""
    figure = _figure(title, footer)
    grid = figure.add_gridspec(2, 2, width_ratios=(3.6, 1), height_ratios=(1, 1.1))
    axes, key, small = (figure.add_subplot(cell) for cell in (grid[:, 0], grid[0, 1], grid[1, 1]))
    key.set_axis_off()
    for each in (axes, small):
        _plain_style(each)
    return figure, axes, key, small


def _figure(title: str, footer: str) -> Figure:
    """Return a figure without panels."""
    from matplotlib.figure import Figure  # noqa: PLC0415, an optional dependency

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    figure.supxlabel(footer, fontsize=7, color="0.4")
    return figure


def _plain_style(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _two_panels(title: str, footer: str, xlabel: str) -> tuple[Figure, Any, Any]:
    """Return an empty figure, and its panels."""
    figure = _figure(title, footer)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set(xlabel=xlabel)
        _plain_style(axes)
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
