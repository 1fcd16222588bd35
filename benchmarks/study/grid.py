"""What is asked: the studies, each a list of cells."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .methods import AFTER_STEP, MUON_AND_ADAMW, OPTIMIZERS
from .tasks import TASKS
from .training import Cell
from .variants import VARIANTS, method_with

__all__ = [
    "BATCH_SIZES",
    "DETERMINISTIC",
    "DROPOUT",
    "FEW_STARTS",
    "LENGTHS",
    "PAIRED",
    "REFERENCE",
    "STARTED",
    "STARTS",
    "STUDIES",
    "TUNED",
    "UNGUARDED",
    "Study",
]

DETERMINISTIC = ("digits", "noise", "friedman", "images", "transformer", "lstm")
"""Tasks whose loss draws nothing at random: those of every study that does not name its own."""
STARTED = (*DETERMINISTIC, "diffusion", "masked")
"""Tasks that are trained from any start: also two whose loss draws noise."""
DROPOUT = "dropout"
"""The task on which probes have the masks of the step, or masks of their own."""
PAIRED = "transformer"
"""The task that two optimizers train."""
REFERENCE = AFTER_STEP
"""AutoLR that the variants are compared with; other batches and longer trainings are of this one too."""
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


def _grid(
    methods: Iterable[str], lrs: Iterable[float], tasks: Sequence[str] = DETERMINISTIC
) -> Callable[[Sequence[int]], Iterable[Cell]]:
    def cells(seeds: Sequence[int]) -> Iterable[Cell]:
        for seed, method, task, optimizer, lr in itertools.product(seeds, methods, tasks, OPTIMIZERS, lrs):
            yield Cell(task, optimizer, method, lr, seed)

    methods, lrs = tuple(methods), tuple(lrs)
    return cells


def _starts(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed in seeds:
        yield from _grid(["AutoLR"], STARTS, STARTED)([seed])
        yield from _grid(["cosine"], TUNED, STARTED)([seed])


def _peers(seeds: Sequence[int]) -> Iterable[Cell]:
    """Those that need no learning rate at the 1 they ask for; Schedule-Free over the grid, since it needs one."""
    for seed, task in itertools.product(seeds, DETERMINISTIC):
        for method, optimizers in _PEERS.items():
            for optimizer in optimizers:
                yield Cell(task, optimizer, method, 1.0, seed)
        for optimizer, lr in itertools.product(("momentum", "AdamW"), TUNED):
            yield Cell(task, optimizer, "Schedule-Free", lr, seed)


def _batches(seeds: Sequence[int]) -> Iterable[Cell]:
    """Batches of 8 to 512, as many steps as otherwise."""
    for seed, task, optimizer, size in itertools.product(seeds, DETERMINISTIC, OPTIMIZERS, BATCH_SIZES):
        if size != TASKS[task].batch_size:
            for lr in FEW_STARTS:
                yield Cell(task, optimizer, REFERENCE, lr, seed, batch_size=size)
            for lr in TUNED:
                yield Cell(task, optimizer, "cosine", lr, seed, batch_size=size)


def _lengths(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed, length, task, optimizer in itertools.product(seeds, LENGTHS, DETERMINISTIC, OPTIMIZERS):
        for lr in FEW_STARTS:
            yield Cell(task, optimizer, REFERENCE, lr, seed, length=length)
        for lr in TUNED:
            yield Cell(task, optimizer, "cosine", lr, seed, length=length)


def _unguarded(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed, setting, task, optimizer in itertools.product(seeds, UNGUARDED.values(), DETERMINISTIC, OPTIMIZERS):
        for method, lr in itertools.product((method_with("not guarded"), REFERENCE), FEW_STARTS):
            yield Cell(task, optimizer, method, lr, seed, **setting)


def _paired(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed, (method, lrs) in itertools.product(seeds, (("AutoLR", STARTS), ("cosine", TUNED))):
        for lr in lrs:
            yield Cell(PAIRED, MUON_AND_ADAMW, method, lr, seed)


STUDIES: Mapping[str, Study] = {
    "starts": Study("AutoLR from any start, and the cosine schedule over a grid", _starts),
    "outside": Study("The cosine schedule far from its best rates", _grid(["cosine"], _OUTSIDE)),
    "variants": Study("AutoLR with one thing changed", _grid([REFERENCE, *map(method_with, VARIANTS)], FEW_STARTS)),
    "schedules": Study(
        "Other schedules over the grid", _grid(["constant", "linear", "step", "one cycle", "plateau"], TUNED)
    ),
    "peers": Study("Optimizers that need no learning rate", _peers),
    "batches": Study("Batches of 8 to 512", _batches),
    "lengths": Study("Two, five and twenty times as long", _lengths),
    "guard": Study(f"Without a guard, {' and '.join(UNGUARDED)}", _unguarded),
    "optimizers": Study("Two optimizers for one model", _paired),
    "replay": Study("Dropout's masks replayed, or not", _grid(["AutoLR", AFTER_STEP], FEW_STARTS, [DROPOUT])),
}
