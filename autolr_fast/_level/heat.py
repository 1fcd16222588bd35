"""How far the level may move: what the noise of the steps costs, against what training gains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._arguments import is_number
from .scalars import Scalar, scalars_of

__all__ = ["Heat"]

_POWERS = (2.0, 4.0)  # of the steps done, by which losses weigh in the two means: both forget the first losses soon
_DOUBLING = math.log(2) / (1 / _POWERS[0] - 1 / _POWERS[1])  # from their difference to the fall in a doubling
_LEAST = 0.1  # of the largest gain so far: less is taken for that, where a loss stands still or rises
_KEPT = 5  # heats, of which the median counts: single ones are as noisy as their batches
_FEWEST = 3  # of them, before any counts
_UP, _DOWN = 0.25, 0.5  # powers of limit / heat by which the level moves: slowly up, faster down
_MOST = 1.5  # the largest move of a probe, up or down


class Heat:
    """Knows the gain of a training and the heat of its steps, and turns them into moves of the level.

    The *gain* is by how much the mean loss falls in a doubling of the steps done. It comes from all losses: two
    means, in which the loss of step s weighs as s and as s cubed, differ by a quarter of what is won over the last
    e-fold of the steps. The *heat* is what averaging would win: the loss of a batch where its step began, less the
    loss at a mean of these parameters and those of some steps before. No step has seen that batch.

    A level is too low while its heat is a small share of the gain, and too high once it is a large one, on all
    networks that were tried. Both are differences of losses: scaling a loss, or adding to it, changes nothing. The
    level rises only while the second mean is at its lowest: in games and policies, where it seldom is, neither heat
    nor gain says anything.

    Nothing here synchronises with the host.

    Args:
        limit: heat in units of the gain, at which the level stays; ``inf`` for none.
        device: of the level.

    Raises:
        TypeError: if ``limit`` is no number.
        ValueError: if it is not positive.

    Example:
        >>> heat = Heat(0.1, torch.device("cpu"))
        >>> for step in range(1, 101):  # a loss that falls by 1 in each doubling of the steps
        ...     heat.add_loss(torch.tensor(-math.log2(step)), step)
        >>> round(heat.gain.item(), 1)
        1.0
        >>> up, moves = torch.tensor(1.2), []
        >>> for each in (0.01, 0.01, 0.01, 0.4, 0.4, 0.4):
        ...     heat.add_heat(torch.tensor(each))
        ...     moves.append(round(heat.temper(up).item(), 2))
        >>> moves
        [1.2, 1.2, 1.5, 1.5, 1.5, 0.67]
    """

    def __init__(self, limit: float, device: torch.device):
        if not is_number(limit):
            raise TypeError(f"max_heat={limit!r}: expected a positive number, or math.inf for no limit")
        if not limit > 0:
            raise ValueError(f"max_heat={limit}: give a positive share of the gain, or math.inf for no limit")
        self.limit = float(limit)
        self._at = scalars_of(device)
        self._means = [self._at.number(math.nan) for _ in _POWERS]
        self._lowest = self._at.number(math.inf)  # of the second mean
        self._is_lowest = self._lowest > 0  # whether it is there now
        self._most = self._at.number(0.0)  # the largest gain
        self._step = 0  # of the last loss
        self._heats = [self._at.number(math.nan)] * _KEPT

    @property
    def gain(self) -> Tensor:
        """By how much the mean loss falls in a doubling of the steps, 0-dim; not a number before the first loss."""
        return self._at.tensor(self._gain())

    def _gain(self) -> Scalar:
        return _DOUBLING * (self._means[0] - self._means[1])

    @property
    def recent_loss(self) -> Tensor:
        """The mean loss of late, 0-dim; not a number before the first."""
        return self._at.tensor(self._means[-1])

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return math.isfinite(self.limit)

    def add_loss(self, loss: Tensor, step: int) -> None:
        """See the mean loss of the steps since the last call.

        Args:
            loss: 0-dim, lower is better; one that is not finite says nothing.
            step: optimizer steps done.
        """
        at, loss = self._at, self._at.number(loss)
        for index, power in enumerate(_POWERS):
            share, mean = 1 - (self._step / step) ** power, self._means[index]
            moved = at.where(at.is_finite(mean), mean + share * (loss - mean), loss)
            self._means[index] = at.where(at.is_finite(loss), moved, mean)
        recent, gain = self._means[-1], self._gain()
        self._is_lowest = recent <= self._lowest
        self._lowest = at.where(self._is_lowest, recent, self._lowest)
        self._most = at.greater(self._most, at.where(at.is_finite(gain), gain, self._most))
        self._step = step

    def add_heat(self, heat: Tensor) -> None:
        """See the heat of the last steps, 0-dim; one that is not finite says nothing."""
        self._heats = [*self._heats[1:], self._at.number(heat)]

    def temper(self, factor: Tensor, due: int = 1) -> Tensor:
        """Return by how much the level moves where the last step alone asks for a factor, 0-dim both.

        Args:
            factor: that which is asked for.
            due: probes since the last one that was made, with this one. The heat goes with the level, so that as
                many moves one after another have this product.
        """
        if not self.is_limited:
            return factor
        at, asked = self._at, self._at.number(factor)
        ratio, is_known = self._ratio()
        # Where one of them counts, the other may be anything.
        cooler = self._within(at.greater(ratio, at.number(1.0)) ** ((1 - _DOWN) ** due - 1), 1 / _MOST, 1.0)
        warmer = self._within(at.greater(ratio, at.number(1e-9)) ** ((1 - _UP) ** due - 1), 1.0, _MOST)
        cooler = at.where(cooler < asked, cooler, asked)
        moved = at.where(ratio > 1, cooler, at.where(asked > 1, warmer, asked))
        moved = at.where(is_known, moved, asked)
        held = at.where(moved > 1, at.number(1.0), moved)
        return at.tensor(at.where(self._is_lowest, moved, held))

    def _within(self, value: Scalar, lowest: float, highest: float) -> Scalar:
        value = self._at.where(value < lowest, self._at.number(lowest), value)
        return self._at.where(value > highest, self._at.number(highest), value)

    def rescale(self, factor: Tensor) -> None:
        """Take into account that the level moved: the heat goes with it."""
        at, times = self._at, self._at.number(factor)
        self._heats = [at.where(heat > 0, heat * times, heat) for heat in self._heats]

    def _ratio(self) -> tuple[Scalar, Scalar]:
        """Return the median heat in units of its limit, 0 to inf, and whether enough is known."""
        at, gain = self._at, self._gain()
        median, count = at.median(self._heats)
        allowed = self.limit * at.greater(gain, _LEAST * self._most)
        divisor = at.where(allowed > 0, allowed, at.number(1.0))  # Python divides by no 0
        ratio = at.where(allowed > 0, median / divisor, at.number(math.inf))
        ratio = at.where(median > 0, ratio, at.number(0.0))
        return ratio, (count >= _FEWEST) & at.is_finite(gain)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes: plain values."""
        return {
            "means": [self._at.plain(mean) for mean in self._means],
            "lowest": self._at.plain(self._lowest),
            "most": self._at.plain(self._most),
            "is_lowest": bool(self._is_lowest),
            "step": self._step,
            "heats": [self._at.plain(heat) for heat in self._heats],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        number = self._at.number
        self._means = [number(mean) for mean in state["means"]]
        self._heats = [number(heat) for heat in state["heats"]]
        self._lowest, self._most = number(state["lowest"]), number(state["most"])
        self._is_lowest = number(state["is_lowest"]) > 0
        self._step = state["step"]
