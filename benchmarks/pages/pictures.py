"""The pictures of ``docs/``: of the study's results, and of two real runs on digits."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from autolr_fast import AutoLR, Probe
from autolr_fast.demo import load_digits, network

from ..study.grid import GROUPS, SCHEDULES, trained_by
from ..study.outcomes import Found, Outcome, medians, outcomes
from ..study.slices import RESULTS, read
from ..study.tasks import TASKS as STUDIED
from .tables import TASKS

__all__ = ["PICTURES"]

_RED, _BLUE, _GREY = "#c1121f", "#3d5a80", "#8d99ae"
_COLOURS = {"SGD": "#009e73", "momentum": "#0072b2", "AdamW": "#d55e00"}
_SHOWN = ("transformer", "images", "finetuned-images", "noise")
"""Tasks of the picture in the README: a gain, a small loss, a draw, and a large loss."""
_STEPS = 330
_START = 1e-4
_CALIBRATED = 20
_LENGTHS = [length / 20 for length in range(31)]


@functools.cache
def _found() -> Found:
    return outcomes(read(RESULTS / "runs.jsonl.xz"))


def any_start() -> Figure:
    """Draw the result over where the learning rate starts: of AutoLR, and of the best tuned schedule."""
    drawn = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, task in zip(drawn.subplots(1, len(_SHOWN)), _SHOWN, strict=True):
        best, auto = _best_schedule(task, "AdamW"), _found()[task, "AdamW", "AutoLR"]
        for outcome, name, style in (
            (best, "best tuned schedule", {"color": _BLUE, "marker": "o", "markersize": 3}),
            (auto, "AutoLR", {"color": _RED, "marker": "o", "markersize": 4, "linewidth": 2.5}),
        ):
            middles = medians(outcome.results)
            axes.plot(middles.keys(), middles.values(), label=name, **style)
        is_loss = STUDIED[task].measure == "loss"
        ends = [best.best()[1], *medians(auto.results).values()]
        span = 0.25 * max(map(abs, ends))
        axes.set_ylim(
            (min(ends) - span / 4, max(ends) + span) if is_loss else (min(ends) - span, max(ends) + span / 4)
        )
        axes.set(xscale="log", xlabel="where the learning rate starts")
        axes.set_ylabel("loss (lower is better)" if is_loss else "accuracy, %")
        axes.set_title(TASKS[task], fontsize=10)
        _plain(axes)
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return _signed(drawn, "AdamW, median of the seeds; python -m benchmarks.study, python -m benchmarks.pages")


def gains() -> Figure:
    """Draw AutoLR's gain over the best tuned schedule: the median start, and from the worst to the best."""
    tasks = [task for task in itertools.chain(*GROUPS.values()) if any(key[0] == task for key in _found())]
    drawn = Figure(figsize=(10, 0.42 * len(tasks) + 1.4), layout="constrained")
    axes = drawn.subplots()
    for place, task in enumerate(tasks):
        for optimizer in trained_by(task):
            best, auto = _best_schedule(task, optimizer), _found().get((task, optimizer, "AutoLR"))
            if best and auto:
                values, style = medians(auto.gains(best)).values(), {"color": _COLOURS[optimizer], "zorder": 3}
                height = place + 0.22 * (list(_COLOURS).index(optimizer) - 1)
                axes.hlines(height, min(values), max(values), linewidth=3, alpha=0.5, **style)
                axes.plot(statistics.median(values), height, "o", markersize=5, **style)
    for optimizer, colour in _COLOURS.items():
        axes.plot([], [], "o", color=colour, label=optimizer)
    axes.legend(frameon=False, loc="lower right")
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(tasks)), [TASKS[task] for task in tasks])
    axes.set_xlabel("gain over the best tuned schedule, in points of accuracy or % of the loss")
    axes.invert_yaxis()
    axes.margins(y=0.02)
    _plain(axes)
    return _signed(drawn, "python -m benchmarks.study, python -m benchmarks.pages")


def _best_schedule(task: str, optimizer: str) -> Outcome | None:
    every = (_found().get((task, optimizer, schedule)) for schedule in SCHEDULES)
    choose = max if STUDIED[task].measure == "accuracy" else min
    return choose((each for each in every if each and each.is_tuned), key=lambda each: each.best()[1], default=None)


class _Run(NamedTuple):
    """A training on digits.

    Attributes:
        probes: made in it.
        rates: learning rate before each step, and after the last one.
        lines: step of each later probe -> losses of its batch over ``_LENGTHS`` of the last ten steps.
    """

    probes: Sequence[Probe]
    rates: Sequence[float]
    lines: Mapping[int, Sequence[float]]


@functools.cache
def _train() -> _Run:
    """Train the demo's network by SGD with momentum 0.9."""
    torch.manual_seed(0)
    model, (images, labels) = network(), load_digits(0).train
    optimizer = torch.optim.SGD(model.parameters(), lr=_START, momentum=0.9)
    scheduler = AutoLR(optimizer, model, total_steps=_STEPS, evaluator="inplace")
    rates, before, lines = [_START], [], {}
    for chosen in torch.randint(len(labels), (_STEPS, 32), generator=torch.Generator().manual_seed(0)):
        x, y = images[chosen], labels[chosen]
        before.append([parameter.detach().clone() for parameter in model.parameters()])
        optimizer.zero_grad()
        scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
        if scheduler.last_probe.step == scheduler.last_epoch > _CALIBRATED:
            lines[scheduler.last_epoch] = _losses_along(model, (before[-11], before[-1]), (x, y))
    return _Run(scheduler.history, rates, lines)


@torch.no_grad()
def _losses_along(
    model: nn.Module, line: tuple[Sequence[Tensor], Sequence[Tensor]], batch: tuple[Tensor, Tensor]
) -> list[float]:
    candidate, losses, (x, y) = copy.deepcopy(model), [], batch
    for length in _LENGTHS:
        for parameter, old, new in zip(candidate.parameters(), *line, strict=True):
            parameter.copy_(old + length * (new - old))
        losses.append(F.cross_entropy(candidate(x), y).item())
    return losses


def line() -> Figure:
    """Draw the losses along the last ten steps at three probes of a run: the rate rises, stays, and falls."""
    run = _train()
    probes = sorted((each for each in run.probes if each.step in run.lines), key=lambda probe: float(probe.factor))
    still = min(probes, key=lambda probe: abs(float(probe.factor) - 1))
    drawn = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, probe in zip(drawn.subplots(1, 3), (probes[-1], still, probes[0]), strict=True):
        axes.plot(_LENGTHS, run.lines[probe.step], color=_GREY, linewidth=2)
        shorter, taken = probe.losses.tolist()
        axes.plot(probe.factors[0], shorter, "o", color=_BLUE, markersize=8, label="a third shorter")
        axes.plot(probe.factors[1], taken, "o", color=_RED, markersize=8, label="as taken")
        axes.set_title(f"step {probe.step}: the rate is multiplied by {float(probe.factor):.2f}", fontsize=11)
        axes.set(xlabel="length of the last ten steps", ylabel="loss of the next batch")
        _plain(axes)
    drawn.axes[0].legend(frameon=False)
    return _signed(drawn, "digits, SGD with momentum; python -m benchmarks.pages")


def phases() -> Figure:
    """Draw the rate of a run, and what AutoLR does when."""
    run = _train()
    probes, last = run.probes, run.probes[-1].step
    drawn = Figure(figsize=(11, 4), layout="constrained")
    axes = drawn.subplots()
    levels = [float(probe.level_after[0]) for probe in probes]
    axes.step([0, *(probe.step for probe in probes), _STEPS], [_START, *levels, levels[-1]], where="post",
              color=_BLUE, label="level")  # fmt: skip
    axes.step(range(_STEPS + 1), run.rates, where="post", color=_RED, linewidth=2, label="learning rate")
    axes.plot([probe.step for probe in probes], levels, "o", color=_BLUE, markersize=4, label="probe")
    for begin, end, name, colour in (
        (0, _CALIBRATED, "calibrate", "#e09f3e"),
        (_CALIBRATED, last, "probe", "white"),
        (last, _STEPS, "anneal alone", _GREY),
    ):
        axes.axvspan(begin, end, color=colour, alpha=0.25, linewidth=0)
        axes.text((begin + end) / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=11)
    axes.annotate("the first step, taken again", (1, levels[0]), (35, 5e-3), arrowprops={"arrowstyle": "->"})
    axes.set(yscale="log", xlabel="optimizer step", ylabel="learning rate", ylim=(5e-5, 2 * max(levels)))
    axes.margins(x=0.01)
    axes.legend(frameon=False, loc="lower center")
    _plain(axes)
    return _signed(drawn, "digits, SGD with momentum, from a rate of 1e-4; python -m benchmarks.pages")


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _signed(drawn: Figure, text: str) -> Figure:
    drawn.supxlabel(text, fontsize=7, color="0.4")
    return drawn


PICTURES: Mapping[str, Callable[[], Figure]] = {
    "any_start.png": any_start,
    "gains.png": gains,
    "line.png": line,
    "phases.png": phases,
}
"""File in ``docs/pictures/`` -> what draws it."""
