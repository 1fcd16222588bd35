"""Epochs: what a search has seen in those that ended, and how far it is in the one that has not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import short
from .random_numbers import RandomNumbers, RandomState

__all__ = ["Branch", "Epoch", "EpochInProgress", "prune"]


class Branch(NamedTuple):
    """One training of an epoch.

    Attributes:
        parent: index of the beam it started from, 0 the best of the epoch before.
        lr: its learning rate.
        loss: mean training loss of the epoch; may not be finite.
    """

    parent: int
    lr: float
    loss: float


class Epoch(NamedTuple):
    """All branches of an epoch, and which of them go on.

    Attributes:
        number: 1 for the first.
        branches: in the order of their beams, and of the factors within a beam.
        survivors: indices of the branches that are the beams of the next epoch, best first.
    """

    number: int
    branches: tuple[Branch, ...]
    survivors: tuple[int, ...]

    @property
    def best(self) -> Branch:
        """The branch of the lowest loss."""
        return self.branches[self.survivors[0]]


def prune(losses: Sequence[float], beams: int) -> tuple[int, ...]:
    """Return the indices of the lowest finite losses, ascending, at most ``beams`` of them.

    Equal losses go by index: the better beam first, then the order of the factors.

    Example:
        >>> prune([0.5, 0.2, float("nan"), 0.2], beams=3)
        (1, 3, 0)
    """
    finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
    return tuple(sorted(finite, key=lambda index: losses[index])[:beams])


@dataclass
class EpochInProgress:
    """An epoch that has not ended: all that another process needs to end it, but the weights.

    Its attributes are its state; none is changed in place.

    Attributes:
        rank: this rank, and how many there are.
        branches: parent and learning rate of the branches of all ranks.
        lrs: C learning rates of those that this rank trains.
        random_at_start: before the first batch was fetched; ``None`` if nobody knows.
        random_after_batch: after the last batch that ended; what was fetched since is fetched again by who goes on.
        batches: how many have ended.
        examples: how many these had.
        loss_sums: [C] float64, over these examples.
        random_in_batch: before the first model of the batch in progress.
        losses_in_batch: of the models that took their step in it, [c] each time.
    """

    rank: list[int]
    branches: list[tuple[int, float]]
    lrs: list[float]
    random_at_start: RandomState | None = None
    random_after_batch: RandomState = field(default_factory=dict)
    batches: int = 0
    examples: int = 0
    loss_sums: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    random_in_batch: RandomState = field(default_factory=dict)
    losses_in_batch: list[Tensor] = field(default_factory=list)

    @property
    def models_done(self) -> int:
        """How many models took their step in the batch in progress."""
        return sum(map(len, self.losses_in_batch))

    def remaining(self, loader: Iterable[Any], random: RandomNumbers) -> Iterator[Any]:
        """Give the batches that were not seen; those that were are fetched again, as they were, and passed over.

        Raises:
            RuntimeError: if it is not known which were seen.
            ValueError: if the loader gives fewer than were seen.
        """
        if self.random_at_start is None and not self.batches:
            self.random_at_start = random.state()
        if self.random_at_start is None:
            raise RuntimeError(
                "this epoch was begun by step(), and which of the loader's batches it has seen is not known: end "
                "it by step() and end_epoch()"
            )
        random.restore(self.random_at_start)
        batches = iter(loader)
        for number in range(self.batches):
            if next(batches, None) is None:
                raise ValueError(
                    f"loader={short(loader)} gave {number} batches, and {self.batches} of this epoch were seen: "
                    "give the loader that the epoch began with"
                )
        if self.batches:
            random.restore(self.random_after_batch)
        yield from batches

    def end_batch(self, examples: int, random: RandomState) -> Tensor:
        """Return the losses of the batch, [C]; it weighs by how many examples it has."""
        parts = self.losses_in_batch or [torch.empty(0)]  # of a rank that has no branches
        losses = torch.cat([part.to(parts[-1].device) for part in parts])
        self.loss_sums = self.loss_sums.to(losses.device) + examples * losses.double()
        self.examples += examples
        self.batches += 1
        self.random_after_batch = random
        self.losses_in_batch = []
        return losses
