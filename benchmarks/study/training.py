"""One training, from a cell of the grid to a row of results."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Collection
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from cpuinfo import get_cpu_info
from torch import nn

import autolr_fast

from .data import Data, Places, batch, hold_back
from .methods import HELD_BACK, METHODS, Training
from .tasks import TASKS, Task, evaluate, held_back_loss, load

__all__ = ["Cell", "Setup", "set_up", "train"]

_POINTS = 40  # of a curve
_WATCHED_EVERY = 10  # steps, where examples are held back
_VALIDATED = 20  # points of the first fifth
_LOST_AFTER = 20  # steps in a row whose loss is not finite


class Cell(NamedTuple):
    """What is trained.

    Attributes:
        task: a name in :data:`~benchmarks.study.tasks.TASKS`.
        optimizer: a name in :data:`~benchmarks.study.methods.OPTIMIZERS`, or ``MUON_AND_ADAMW`` there.
        method: a name in :data:`~benchmarks.study.methods.METHODS`.
        lr: where the learning rate starts.
        seed: of the weights and the order of the examples.
        batch_size: examples in a batch; 0 for the task's.
        length: times as many steps as the task has.
    """

    task: str
    optimizer: str
    method: str
    lr: float
    seed: int
    batch_size: int = 0
    length: int = 1


class Setup(NamedTuple):
    """A network, its data and how it is trained, before the first step."""

    task: Task
    data: Data
    model: nn.Module
    training: Training
    batch_size: int
    total: int


def set_up(cell: Cell, places: Places) -> Setup:
    """Return what a cell asks for, the same each time; this process keeps to one thread."""
    torch.set_num_threads(1)
    task = TASKS[cell.task]
    total = cell.length * task.steps
    torch.manual_seed(cell.seed)
    model = task.model(places)
    training = METHODS[cell.method](model, cell.optimizer, cell.lr, total)
    return Setup(task, load(cell.task, places), model, training, cell.batch_size or task.batch_size, total)


def train(cell: Cell, places: Places, validated: Collection[str] = ()) -> dict[str, Any]:
    """Train, and return the cell and what came of it.

    Args:
        cell: what is trained.
        places: of the data.
        validated: methods whose loss on the test examples is measured early in training.

    Returns:
        ``result``, what the task measures at the end, ``None`` if it is not finite; ``loss``, the mean training
        loss of the last tenth; ``lost``, the step from which the loss was not finite, if any; ``lrs``, the learning
        rates of about 40 steps from the first to the last, and ``losses``, the mean training loss between these;
        ``validation``, the loss on the test examples at up to 20 points of the first fifth of the steps, in units
        of that before training, ``None`` where that is not finite; ``None`` for all if it is not measured;
        ``seconds`` of training, ``scheduling``, how many of these were spent in the scheduler, and ``machine``,
        which that was, and the versions.
    """
    task, data, model, training, size, total = set_up(cell, places)
    lrs, losses, lost = [], [], None
    if cell.method == HELD_BACK:
        data, held = hold_back(data, cell.seed)
    validation = _Validation(task, model, data, total) if cell.method in validated else None
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(total):
            x, y = batch(data, step, size, cell.seed)
            lrs.append(training.lr)
            losses.append(training.step(partial(task.loss, model, x, y)))
            if step % _LOST_AFTER == _LOST_AFTER - 1 and not torch.stack(losses[-_LOST_AFTER:]).isfinite().any():
                lost = step + 1 - _LOST_AFTER
                break
            if cell.method == HELD_BACK and step % _WATCHED_EVERY == _WATCHED_EVERY - 1:
                training.watch(held_back_loss(task, model, held))
            if validation:
                validation.see(step + 1)
            if training.has_ended:
                break
    seconds = time.perf_counter() - start - (validation.seconds if validation else 0.0)
    result = evaluate(task, training.tested(model), data)
    values = torch.stack(losses).tolist()
    stride = max(1, total // _POINTS)
    return {
        **cell._asdict(),
        "result": result if math.isfinite(result) and lost is None else None,
        "loss": _mean(values[-max(1, total // 10) :]),
        "lost": lost,
        "lrs": [float(f"{lr:.3g}") for lr in (*lrs[::stride], lrs[-1])],
        "losses": [_mean(values[i : i + stride]) for i in range(0, len(values), stride)],
        "validation": validation and validation.ratios,
        "steps": len(values),
        "seconds": round(seconds, 3),
        "scheduling": round(training.scheduling, 3),
        "machine": _machine(),
    }


class _Validation:
    """The loss on the test examples in the first fifth of a training, and the seconds that it took to measure."""

    def __init__(self, task: Task, model: nn.Module, data: Data, total: int):
        self.ratios: list[float | None] = []
        self.seconds = 0.0
        self._points = {math.ceil(total * point / (5 * _VALIDATED)) for point in range(1, _VALIDATED + 1)}
        self._measure = partial(evaluate, task._replace(measure="loss"), model, data)
        self._before = self._measure()

    def see(self, step: int) -> None:
        """Measure if so many steps are one of the points."""
        if step in self._points:
            start = time.perf_counter()
            self.ratios.append(_rounded(self._measure() / self._before))
            self.seconds += time.perf_counter() - start


@cache
def _machine() -> str:
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return f"{get_cpu_info()['brand_raw']}, {versions}, autolr_fast {autolr_fast.__version__}"


def _mean(values: list[float]) -> float | None:
    return _rounded(math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf)


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
