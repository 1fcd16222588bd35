"""The heat at a rate, and what came of that rate: ``python -m benchmarks.study.signals --help``.

Trains under the cosine schedule from each rate of the grid and only watches: every ten steps it takes the heat as
AutoLR does, and moves nothing. ``heat.py`` draws it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autolr_fast._level.heat import Heat

from .data import Places, batch
from .grid import GROUPS, RATES, trained_by
from .slices import add_arguments, run_missing
from .tasks import Task, evaluate
from .training import Cell, set_up

__all__ = ["AVERAGED", "QUARTERS", "watch"]

AVERAGED = 10
"""Steps between the parameters whose mean shows the heat, and from one heat to the next."""
QUARTERS = 4
State = Mapping[str, Tensor]


def watch(cell: Cell, places: Places) -> dict[str, Any]:
    """Train and watch.

    Returns:
        The cell, its ``result`` (``None`` if it is not finite), and ``ratios``: of each quarter of the training the
        median heat in units of the gain, ``None`` where there is none or the training gains nothing.
    """
    task, data, model, training, size, total = set_up(cell, places)
    heat = Heat(math.inf, torch.device("cpu"))
    before: deque[State] = deque(maxlen=AVERAGED + 1)  # each step
    ratios: list[list[float]] = [[] for _ in range(QUARTERS)]
    for step in range(total):
        before.append(
            {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
        )
        x, y = batch(data, step, size, cell.seed)
        noise = torch.get_rng_state()
        loss = training.step(partial(task.loss, model, x, y))
        if not loss.isfinite():
            break
        heat.add_loss(loss, step + 1)
        if step % AVERAGED == AVERAGED - 1 and step >= AVERAGED:
            ratio = _heat(task, model, before, (x, y), noise) / heat.gain.item()
            ratios[QUARTERS * step // total].append(ratio if heat.gain > 0 else math.inf)
    result = evaluate(task, training.tested(model), data)
    medians = [statistics.median(of_quarter) if of_quarter else math.inf for of_quarter in ratios]
    return {
        **cell._asdict(),
        "result": result if math.isfinite(result) and loss.isfinite() else None,
        "ratios": [float(f"{median:.4g}") if math.isfinite(median) else None for median in medians],
    }


@torch.no_grad()
def _heat(
    task: Task, model: nn.Module, before: Sequence[State], examples: tuple[Tensor, Tensor], noise: Tensor
) -> float:
    """Return by how much the mean of the oldest and the newest parameters is better than the newest."""
    older, newer = before[0], before[-1]
    mean = {name: newer[name] + (older[name] - newer[name]) / 3 for name in newer}
    losses = []
    for parameters in (newer, mean):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.random.fork_rng(devices=()):
            torch.set_rng_state(noise)
            losses.append(task.loss(partial(functional_call, model, {**parameters, **buffers}), *examples).item())
    return losses[0] - losses[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.signals", description="Watch the heat.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    cells = (
        Cell(task, optimizer, "cosine", lr, seed)
        for seed in range(args.seeds)
        for tasks in GROUPS.values()
        for task in tasks
        for optimizer in trained_by(task)
        for lr in RATES[optimizer]
    )
    run_missing(watch, cells, args.results / "signals.jsonl.xz", args, parser)


if __name__ == "__main__":
    main()
