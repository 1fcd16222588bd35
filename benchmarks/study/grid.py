"""What is asked: the studies, each a list of cells."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .methods import AFTER_STEP, HELD_BACK, MUON_AND_ADAMW, OPTIMIZERS, WARMED_UP
from .tasks import TASKS
from .training import Cell
from .variants import VARIANTS, method_with

__all__ = [
    "BATCH_SIZES",
    "DETERMINISTIC",
    "DROPOUT",
    "FEW_STARTS",
    "FINE_TUNED",
    "FROM_SCRATCH",
    "GROUPS",
    "LENGTHS",
    "NOISY",
    "PAIRED",
    "RATES",
    "SCHEDULES",
    "STARTS",
    "STUDIES",
    "TUNED",
    "WRONG_LABELS",
    "Study",
    "trained_by",
]

DETERMINISTIC = ("digits", "noise", "friedman", "images", "transformer", "lstm")
"""Tasks of every study that does not name its own; nothing in their loss is random."""
FROM_SCRATCH = (*DETERMINISTIC, "gru", "vit")
NOISY = ("diffusion", "masked", "vae")
"""Tasks whose loss draws noise."""
FINE_TUNED = ("finetuned-images", "finetuned-text", "speakers", "speakers-adapters")
"""Tasks that begin with weights of another training."""
GROUPS: Mapping[str, Sequence[str]] = {
    "From scratch": FROM_SCRATCH,
    "Noise in the loss": NOISY,
    "Fine-tuning": FINE_TUNED,
}
"""The tasks of the main study."""
WRONG_LABELS = "noise"
"""The task on which AutoLR watches examples held back besides."""
DROPOUT = "dropout"
"""The task on which probes have the masks of the step, or masks of their own."""
PAIRED = "transformer"
"""The task that two optimizers train."""
STARTS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)
"""Where AutoLR starts."""
FEW_STARTS = (1e-4, 1.0)
"""Where it starts with one thing changed, with other batches and in longer trainings."""
SCHEDULES = ("cosine", "one cycle", WARMED_UP)
"""What AutoLR is compared with in the main study, each from its best rate."""
TUNED = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""What a schedule is tuned over in other studies."""
RATES: Mapping[str, Sequence[float]] = {
    "SGD": TUNED[3:],
    "momentum": TUNED[2:],
    "AdamW": (1e-4, *TUNED[:6]),
    MUON_AND_ADAMW: TUNED,
}
"""What a schedule is tuned over in the main study, by optimizer."""
BATCH_SIZES = (8, 32, 128, 512)
LENGTHS = (2, 5, 20)
"""How many times as many steps as the task has."""
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


def trained_by(task: str) -> Sequence[str]:
    """Return the optimizers that train a task."""
    return [name for name in OPTIMIZERS if not (name == "SGD" and task in FINE_TUNED)]


def _grid(
    methods: Iterable[str], lrs: Iterable[float], tasks: Sequence[str] = DETERMINISTIC
) -> Callable[[Sequence[int]], Iterable[Cell]]:
    def cells(seeds: Sequence[int]) -> Iterable[Cell]:
        for seed, method, task, optimizer, lr in itertools.product(seeds, methods, tasks, OPTIMIZERS, lrs):
            yield Cell(task, optimizer, method, lr, seed)

    methods, lrs = tuple(methods), tuple(lrs)
    return cells


def _starts(seeds: Sequence[int]) -> Iterable[Cell]:
    tasks = list(itertools.chain(*GROUPS.values()))
    trained = [(task, optimizer) for task in tasks for optimizer in trained_by(task)]
    for seed in seeds:
        for (task, optimizer), lr in itertools.product(trained, STARTS):
            yield Cell(task, optimizer, "AutoLR", lr, seed)
        yield from _grid([HELD_BACK], STARTS, [WRONG_LABELS])([seed])
        for method, (task, optimizer) in itertools.product(SCHEDULES, trained):
            for lr in RATES[optimizer]:
                yield Cell(task, optimizer, method, lr, seed)


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
                yield Cell(task, optimizer, "AutoLR", lr, seed, batch_size=size)
            for lr in TUNED:
                yield Cell(task, optimizer, "cosine", lr, seed, batch_size=size)


def _lengths(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed, length, task, optimizer in itertools.product(seeds, LENGTHS, DETERMINISTIC, OPTIMIZERS):
        for lr in FEW_STARTS:
            yield Cell(task, optimizer, "AutoLR", lr, seed, length=length)
        for lr in TUNED:
            yield Cell(task, optimizer, "cosine", lr, seed, length=length)


def _paired(seeds: Sequence[int]) -> Iterable[Cell]:
    for seed, (method, lrs) in itertools.product(seeds, (("AutoLR", STARTS), ("cosine", RATES[MUON_AND_ADAMW]))):
        for lr in lrs:
            yield Cell(PAIRED, MUON_AND_ADAMW, method, lr, seed)


STUDIES: Mapping[str, Study] = {
    "starts": Study("AutoLR from any start, and three schedules over a grid", _starts),
    "outside": Study("The cosine schedule far from its best rates", _grid(["cosine"], _OUTSIDE)),
    "variants": Study("AutoLR with one thing changed", _grid(["AutoLR", *map(method_with, VARIANTS)], FEW_STARTS)),
    "schedules": Study("Other schedules over the grid", _grid(["constant", "linear", "step", "plateau"], TUNED)),
    "peers": Study("Optimizers that need no learning rate", _peers),
    "batches": Study("Batches of 8 to 512", _batches),
    "lengths": Study("Two, five and twenty times as long", _lengths),
    "optimizers": Study("Two optimizers for one model", _paired),
    "replay": Study("Dropout's masks replayed, or not", _grid(["AutoLR", AFTER_STEP], FEW_STARTS, [DROPOUT])),
}
