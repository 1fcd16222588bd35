"""What methods reach, and by how much that is better than what others do."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from .grid import RATES, TUNED
from .tasks import TASKS

__all__ = [
    "Found",
    "Gains",
    "Outcome",
    "Row",
    "error",
    "gain",
    "medians",
    "noted",
    "of_seeds",
    "outcomes",
    "with_error",
]

Row = Mapping[str, Any]
_LOST = {"accuracy": 0.0, "loss": math.inf}


class Outcome:
    """What a method reaches on a task with an optimizer.

    Attributes:
        results: lr0 -> seed -> result.
        training: lr0 -> median training loss of the last tenth.
        extra: median share by which the scheduler lengthens the training.
        grid: rates that a schedule is tuned over.
        validation: the highest loss on the test examples in the first fifth of a training, in units of that before
            it; ``None`` if it was not measured.
    """

    def __init__(self, rows: Sequence[Row]):
        self.task: str = rows[0]["task"]
        lost = _LOST[TASKS[self.task].measure]
        self.results: dict[float, dict[int, float]] = {}
        self.training: dict[float, float] = {}
        for lr, of_lr in _by_start(rows):
            self.results[lr] = {row["seed"]: lost if row["result"] is None else row["result"] for row in of_lr}
            losses = [math.inf if row["loss"] is None else row["loss"] for row in of_lr]
            self.training[lr] = statistics.median(losses)
        self.extra = statistics.median(row["scheduling"] / (row["seconds"] - row["scheduling"]) for row in rows)
        is_main = (rows[0]["batch_size"], rows[0]["length"]) == (0, 1)
        self.grid = RATES[rows[0]["optimizer"]] if is_main else TUNED
        ratios = [ratio for row in rows for ratio in row.get("validation") or ()]
        self.validation = max((math.inf if ratio is None else ratio for ratio in ratios), default=None)

    @property
    def is_tuned(self) -> bool:
        """Whether it was run from a rate that a schedule is tuned over."""
        return any(lr in self.grid for lr in self.results)

    def best(self, without: int | None = None, seeds: Collection[int] = ()) -> tuple[float, float]:
        """Return the start with the best median among those that a schedule is tuned over, and that.

        A start has no chance with less than half as many seeds as another: it may only have been lucky.

        Args:
            without: a seed that has no say.
            seeds: that a start must have been run with.
        """
        in_grid = {lr: by_seed for lr, by_seed in self.results.items() if lr in self.grid}
        fewest = max(map(len, in_grid.values())) / 2
        tuned = {
            lr: statistics.median(of_others)
            for lr, by_seed in in_grid.items()
            if len(by_seed) >= fewest and by_seed.keys() >= set(seeds)
            if (of_others := [result for seed, result in by_seed.items() if seed != without])
        }
        choose = max if TASKS[self.task].measure == "accuracy" else min
        lr = choose(tuned, key=tuned.__getitem__)
        return lr, tuned[lr]

    def gains(self, tuned: Outcome, held_out: bool = False) -> Gains:
        """Return by how much each run is better than the run of the same seed from the best start of another.

        Args:
            tuned: the other.
            held_out: whether the seed that is compared has no say in which start is the best; needs two seeds.
        """
        references = tuned.results[tuned.best()[0]]
        if held_out:
            references = {seed: tuned.results[tuned.best(seed, references)[0]][seed] for seed in references}
        return self._gains(dict.fromkeys(self.results, references))

    def changes(self, other: Outcome) -> Gains:
        """Return by how much each run is better than another's of the same seed from the same start."""
        return self._gains(other.results)

    def _gains(self, references: Mapping[float, Mapping[int, float]]) -> Gains:
        """Return the gains over the results that there are of the same start and seed."""
        gains = {
            lr: {
                seed: gain(self.task, result, references[lr][seed])
                for seed, result in by_seed.items()
                if seed in references[lr]
            }
            for lr, by_seed in self.results.items()
            if lr in references
        }
        return {lr: by_seed for lr, by_seed in gains.items() if by_seed}


def _by_start(rows: Sequence[Row]) -> list[tuple[float, list[Row]]]:
    ordered = sorted(rows, key=itemgetter("lr"))
    return [(lr, list(of_lr)) for lr, of_lr in itertools.groupby(ordered, itemgetter("lr"))]


Gains = Mapping[float, Mapping[int, float]]
"""lr0 -> seed -> gain."""
Found = Mapping[tuple[str, str, str], Outcome]
"""(task, optimizer, method) -> outcome."""


def outcomes(rows: Iterable[Row], batch_size: int = 0, length: int = 1) -> dict[tuple[str, str, str], Outcome]:
    """Return the outcome of each (task, optimizer, method) with a batch size (0 for the task's) and a length."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["length"] == length and row["batch_size"] == batch_size:
            grouped.setdefault((row["task"], row["optimizer"], row["method"]), []).append(row)
    return {key: Outcome(of_key) for key, of_key in grouped.items()}


def gain(task: str, result: float, reference: float) -> float:
    """Return by how much a result is better than another: points of accuracy, or % of the loss."""
    if TASKS[task].measure == "accuracy":
        return result - reference
    return -math.inf if math.isinf(result) else 100 * (1 - result / reference)


def medians(by_start: Mapping[float, Mapping[int, float]]) -> dict[float, float]:
    """Return the median over the seeds, of results or gains, by lr0."""
    return {lr: statistics.median(by_seed.values()) for lr, by_seed in by_start.items()}


def of_seeds(gains: Gains) -> list[float]:
    """Return the median over the starts, of each seed that all of them have."""
    seeds = set.intersection(*(set(by_seed) for by_seed in gains.values())) if gains else set()
    return [statistics.median(by_seed[seed] for by_seed in gains.values()) for seed in seeds]


def error(gains: Gains) -> float | None:
    """Return the standard error, over the seeds, of the median over the starts; none of less than three seeds."""
    middles = of_seeds(gains)
    if len(middles) < 3 or not all(map(math.isfinite, middles)):
        return None
    return statistics.stdev(middles) / math.sqrt(len(middles))


def with_error(gains: Gains) -> str:
    """Return the median over the starts of the medians over the seeds, and its standard error if it has one."""
    noise = error(gains)
    return f"{statistics.median(medians(gains).values()):+.1f}{'' if noise is None else f' ± {noise:.1f}'}"


def noted(gains: Gains) -> str:
    """Return the mean over the seeds of the median over the starts, and its standard error or how many seeds.

    It is bold if it is more than two errors from nothing, and empty if no seed has all starts.
    """
    of_each = of_seeds(gains)
    if not of_each:
        return ""
    mean, noise = statistics.mean(of_each), error(gains)
    if noise is not None:
        mark = "**" if abs(mean) > 2 * noise else ""
        return f"{mark}{mean:+.1f} ± {noise:.1f}{mark}"
    if math.isinf(mean):
        return f"**{mean:+.1f}**"
    return f"{mean:+.1f} ({len(of_each)} seed{'s' * (len(of_each) > 1)})"
