"""The tasks, and one run of one."""

from __future__ import annotations

import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from .adapters import adapt
from .players import METHODS, Player, Setting
from .policies import bandit, ppo, reinforce
from .ring import gan, wgan

__all__ = ["ADAPTERS", "TASKS", "Cell", "Task", "run", "without_numbers"]


class Task(NamedTuple):
    """What is trained, and how long.

    Attributes:
        about: in a sentence, for the page.
        lr: the rate that is usual for it with Adam.
        steps: of the training, as ``play`` counts them.
        play: trains, and returns the figures and the players.
    """

    about: str
    lr: float
    steps: int
    play: Callable[[Setting], tuple[dict[str, float], list[Player]]]


ADAPTERS = "adapters"
TASKS: Mapping[str, Task] = {
    "GAN": Task(
        "Eight Gaussian modes on a ring, non-saturating loss, 2,000 rounds of one step each.", 3e-3, 2000, gan
    ),
    "WGAN": Task(
        "The same ring, Wasserstein loss with gradient penalty, 800 rounds of three critic steps.", 2e-3, 800, wgan
    ),
    "bandit": Task("REINFORCE on a contextual bandit of five arms, 400 batches of 64 pulls.", 3e-3, 400, bandit),
    "REINFORCE": Task("CartPole of 200 steps, 100 batches of 16 episodes, a step each.", 3e-3, 100, reinforce),
    "PPO": Task("CartPole of 200 steps, 25 batches of 16 episodes, 16 steps each.", 3e-3, 25, ppo),
    ADAPTERS: Task(
        "Adapters of rank 4 on a transformer that was pretrained on another Markov chain, AdamW, 150 steps.",
        1e-2,
        150,
        adapt,
    ),
}


class Cell(NamedTuple):
    """One run.

    Attributes:
        task: in :data:`TASKS`.
        method: in :data:`~benchmarks.games.players.METHODS`.
        lr: where each optimizer starts.
        seed: of all random numbers.
    """

    task: str
    method: str
    lr: float
    seed: int


def run(cell: Cell, steps: int | None = None) -> dict[str, Any]:
    """Train, and return a row.

    Args:
        cell: what to train.
        steps: instead of the task's.

    Returns:
        The cell with its ``figures``, ``players``, ``warnings`` (each once), ``error`` and ``seconds``. A figure
        that is not finite is ``None``. A training that raised has an ``error``, and neither figures nor players.
    """
    task = TASKS[cell.task]
    torch.manual_seed(cell.seed)
    figures: dict[str, float] = {}
    players: list[Player] = []
    error = None
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            figures, players = task.play(Setting(METHODS[cell.method], cell.lr, steps or task.steps, cell.seed))
        except Exception as raised:  # a method that refuses a task is a result
            error = f"{type(raised).__name__}: {raised}"
    return {
        **cell._asdict(),
        "figures": {name: value if math.isfinite(value) else None for name, value in figures.items()},
        "players": [_summary(player) for player in players],
        "warnings": _each_once(str(warning.message) for warning in caught),
        "error": error,
        "seconds": time.perf_counter() - start,
    }


def _summary(player: Player) -> dict[str, Any]:
    """Return what became of the rate."""
    levels = player.levels
    seen = {"median": statistics.median(levels), "highest": max(levels), "last": levels[-1]} if levels else {}
    return {"name": player.name, "retaken": player.retaken, **seen}


def _each_once(messages: Iterable[str]) -> list[str]:
    """Return the first of the messages that differ in nothing but numbers."""
    found: dict[str, str] = {}
    for message in messages:
        found.setdefault(without_numbers(message), message)
    return list(found.values())


def without_numbers(text: str) -> str:
    """Return a text that two warnings of one kind have in common."""
    return re.sub(r"[-+]?\d[\d.,e+-]*|\bnan\b|\binf\b", "#", text)
