"""What is asked: the studies, each a list of cells."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .methods import OPTIMIZERS
from .tasks import TASKS
from .training import Cell
from .variants import VARIANTS, method_with

__all__ = ["BATCH_SIZES", "FEW_STARTS", "LENGTHS", "STARTS", "STUDIES", "TUNED", "UNGUARDED", "Study"]

STARTS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)
"""Where AutoLR starts."""
FEW_STARTS = (1e-4, 1.0)
"""Where it starts with one thing changed, with other batches and in longer trainings."""
TUNED = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""What a schedule is tuned over."""
BATCH_SIZES = (8, 32, 128, 512)
LENGTHS = (2, 5, 20)
"""How many times as many steps as the task has."""
UNGUARDED: Mapping[str, Mapping[str, int]] = {
    "in batches of 8": {"batch_size": 8},
    "five times as long": {"length": 5},
}
"""Where it is trained without a guard besides."""
_OUTSIDE = (1e-6, 1e-5, 1e-4, 10.0)
_PEERS = {"D-Adaptation": OPTIMIZERS, "Prodigy": ("AdamW",), "DoG": ("SGD",), "SaLSA": ("AdamW",)}


class Study(NamedTuple):
    """A question and the cells that answer it, those of a seed after those of the one before.

    Attributes:
        title: of its table.
        cells: from seeds to cells.
    """

    title: str
    cells: Callable[[Sequence[int]], Iterable[Cell]]


def _grid(methods: Iterable[str], lrs: Iterable[float]) -> Callable[[Sequence[int]], Iterable[Cell]]:
    def cells(seeds: Sequence[int]) -> Iterable[Cell]:
        for seed, method, task, optimizer, lr in itertools.product(seeds, methods, TASKS, OPTIMIZERS, lrs):
            yield Cell(task, optimizer, method, lr, seed)

    methods, lrs = tuple(methods), tuple(lrs)
    return cells


def _peers(seeds: Sequence[int]) -> Iterable[Cell]:
    """Those that need no learning rate at the 1 they ask for; Schedule-Free over the grid, since it needs one."""
    for seed, task in itertools.product(seeds, TASKS):
        for method, optimizers in _PEERS.items():
            for optimizer in optimizers:
                yield Cell(task, optimizer, method, 1.0, seed)
        for optimizer, lr in itertools.product(("momentum", "AdamW"), TUNED):
            yield Cell(task, optimizer, "Schedule-Free", lr, seed)


def _batches(seeds: Sequence[int]) -> Iterable[Cell]:
    """Batches of 8 to 512, as many steps as otherwise."""
    for seed, task, optimizer, size in itertools.product(seeds, TASKS, OPTIMIZERS, BATCH_SIZES):
        if size != TASKS[task].batch_size:
            for lr in FEW_STARTS:
                yield Cell(task, optimizer, "AutoLR", lr, seed, batch_size=size)
            for lr in TUNED:
                yield Cell(task, optimizer, "cosine", lr, seed, batch_size=size)


def _lengths(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed, length, task, optimizer in itertools.product(seeds, LENGTHS, TASKS, OPTIMIZERS):
        for lr in FEW_STARTS:
            yield Cell(task, optimizer, "AutoLR", lr, seed, length=length)
        for lr in TUNED:
            yield Cell(task, optimizer, "cosine", lr, seed, length=length)


def _unguarded(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed, setting, task, optimizer in itertools.product(seeds, UNGUARDED.values(), TASKS, OPTIMIZERS):
        for method, lr in itertools.product((method_with("not guarded"), "AutoLR"), FEW_STARTS):
            yield Cell(task, optimizer, method, lr, seed, **setting)


STUDIES: Mapping[str, Study] = {
    "starts": Study(
        "AutoLR from any start, and the cosine schedule over a grid",
        lambda seeds: itertools.chain.from_iterable(
            itertools.chain(_grid(["AutoLR"], STARTS)([seed]), _grid(["cosine"], TUNED)([seed])) for seed in seeds
        ),
    ),
    "outside": Study("The cosine schedule far from its best rates", _grid(["cosine"], _OUTSIDE)),
    "variants": Study("AutoLR with one thing changed", _grid(map(method_with, VARIANTS), FEW_STARTS)),
    "schedules": Study(
        "Other schedules over the grid", _grid(["constant", "linear", "step", "one cycle", "plateau"], TUNED)
    ),
    "peers": Study("Optimizers that need no learning rate", _peers),
    "batches": Study("Batches of 8 to 512", _batches),
    "lengths": Study("Two, five and twenty times as long", _lengths),
    "guard": Study(f"Without a guard, {' and '.join(UNGUARDED)}", _unguarded),
}
