"""What the losses say at a rate, and what came of that rate: ``python -m benchmarks.study.signals --help``.

Trains under the cosine schedule from each rate of the grid and only watches: at every twentieth step it evaluates
the loss along several lines, at several scales, and moves nothing. A signal is worth following if it calls for a
higher rate where the rate was too low for the result, and for a lower one where it was too high.
"""

from __future__ import annotations

import argparse
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .grid import DETERMINISTIC, TUNED
from .methods import OPTIMIZERS
from .slices import add_arguments, run_missing
from .tasks import Places, Task, batch, evaluate
from .training import Cell, set_up

__all__ = ["watch"]

SCALES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_EVERY = 20
_QUARTERS = 4
State = Mapping[str, Tensor]


def watch(cell: Cell, places: Places) -> dict[str, Any]:
    """Train and watch.

    Returns:
        The cell, its ``result``, and ``signals``: name -> quarter -> mean loss at each of ``SCALES``, ``None``
        where nothing was looked at. ``own w`` is the line over the last w steps on the batch of the last;
        ``next w`` is that line on the batch after it; ``before`` is the last step but one, scaled while the last
        stays as it was, on the batch of the last.
    """
    task, data, model, training, size, total = set_up(cell, places)
    history: deque[State] = deque(maxlen=5)
    sums: dict[str, list[list[Tensor]]] = {}
    for step in range(total):
        due = step % _EVERY
        if due >= _EVERY - 5:
            history.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        x, y = batch(data, step, size, cell.seed)
        training.step(partial(task.loss, model, x, y))
        if due == _EVERY - 1:
            now = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            following = batch(data, step + 1, size, cell.seed)
            for name, losses in _look(task, model, [*history, now], (x, y), following).items():
                quarters = sums.setdefault(name, [[] for _ in range(_QUARTERS)])
                quarters[_QUARTERS * step // total].append(losses)
    return {
        **cell._asdict(),
        "result": evaluate(task, model, data),
        "signals": {
            name: [torch.stack(losses).mean(0).tolist() if losses else None for losses in quarters]
            for name, quarters in sums.items()
        },
    }


@torch.no_grad()
def _look(
    task: Task,
    model: nn.Module,
    states: Sequence[State],
    own: tuple[Tensor, Tensor],
    following: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    *_, before2, before, now = states
    lines: dict[str, tuple[State, State, tuple[Tensor, Tensor]]] = {}
    for window in (1, 2, 3, 4):
        start = states[-1 - window]
        direction = {name: now[name] - start[name] for name in now}
        lines[f"own {window}"] = (direction, now, own)
        if window <= 2:
            lines[f"next {window}"] = (direction, now, following)
    lines["before"] = ({name: before[name] - before2[name] for name in now}, now, own)
    found = {}
    for name, (direction, end, examples) in lines.items():
        losses = []
        for scale in SCALES:
            candidate = {key: end[key] + (scale - 1) * direction[key] for key in end}
            buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
            losses.append(task.loss(partial(functional_call, model, {**candidate, **buffers}), *examples))
        found[name] = torch.stack(losses)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.signals", description="Watch the losses.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    grid = itertools.product(range(args.seeds), DETERMINISTIC, OPTIMIZERS, TUNED)
    cells = (Cell(task, optimizer, "cosine", lr, seed) for seed, task, optimizer, lr in grid)
    run_missing(watch, cells, args.results / "signals.jsonl", args, parser)


if __name__ == "__main__":
    main()
