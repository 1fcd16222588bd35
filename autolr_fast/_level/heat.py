"""How far the level may move: what the noise of the steps costs, against what training gains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._arguments import is_number

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
    means, in which the loss of step s weighs as s and as s cubed, differ by what is won over the last e-fold of the
    steps. The *heat* is what averaging would win: the loss of a batch where its step began, less the loss at a mean
    of these parameters and those of some steps before. No step has seen that batch.

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
        self._means = torch.full((len(_POWERS),), math.nan, dtype=torch.float64, device=device)
        self._powers = torch.tensor(_POWERS, dtype=torch.float64, device=device)
        self._lowest = torch.full((), math.inf, dtype=torch.float64, device=device)  # of the second mean
        self._is_lowest = torch.ones((), dtype=torch.bool, device=device)  # whether it is there now
        self._most = torch.zeros((), dtype=torch.float64, device=device)  # the largest gain
        self._step = 0  # of the last loss
        self._heats = torch.full((_KEPT,), math.nan, dtype=torch.float64, device=device)

    @property
    def gain(self) -> Tensor:
        """By how much the mean loss falls in a doubling of the steps, 0-dim; not a number before the first loss."""
        return _DOUBLING * (self._means[0] - self._means[1])

    @property
    def recent_loss(self) -> Tensor:
        """The mean loss of late, 0-dim; not a number before the first."""
        return self._means[-1]

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
        share = 1 - (self._step / step) ** self._powers
        loss = loss.to(self._means)
        means = torch.where(self._means.isnan(), loss, self._means + share * (loss - self._means))
        self._means = torch.where(loss.isfinite(), means, self._means)
        recent = self.recent_loss
        self._is_lowest = recent <= self._lowest
        self._lowest = torch.where(self._is_lowest, recent, self._lowest)
        self._most = torch.maximum(self._most, self.gain.nan_to_num(0.0))
        self._step = step

    def add_heat(self, heat: Tensor) -> None:
        """See the heat of the last steps, 0-dim; one that is not finite says nothing."""
        heat = torch.where(heat.isfinite(), heat, math.nan).to(self._heats)
        self._heats = torch.cat([self._heats[1:], heat.reshape(1)])

    def temper(self, factor: Tensor, due: int = 1) -> Tensor:
        """Return by how much the level moves where the last step alone asks for a factor, 0-dim both.

        Args:
            factor: that which is asked for.
            due: probes since the last one that was made, with this one. The heat goes with the level, so that as
                many moves one after another have this product.
        """
        if not self.is_limited:
            return factor
        ratio, is_known = self._ratio()
        cooler = ratio.pow((1 - _DOWN) ** due - 1).clamp(1 / _MOST, 1.0)
        warmer = torch.minimum(ratio.clamp_min(1e-9).pow((1 - _UP) ** due - 1), factor.new_tensor(_MOST)).clamp_min(
            1.0
        )
        moved = torch.where(ratio > 1, torch.minimum(cooler, factor), torch.where(factor > 1, warmer, factor))
        moved = torch.where(is_known, moved, factor)
        return torch.where(self._is_lowest, moved, moved.clamp_max(1.0))

    def rescale(self, factor: Tensor) -> None:
        """Take into account that the level moved: the heat goes with it."""
        self._heats = torch.where(self._heats > 0, self._heats * factor, self._heats)

    def _ratio(self) -> tuple[Tensor, Tensor]:
        """Return the median heat in units of its limit, 0 to inf, and whether enough is known; 0-dim both."""
        count = self._heats.isfinite().sum()
        ordered = self._heats.sort().values  # what is not a number comes last
        median = ordered.gather(0, (count // 2).clamp_max(_KEPT - 1).reshape(1)).squeeze(0)
        gain = torch.maximum(self.gain, _LEAST * self._most)
        ratio = torch.where(gain > 0, median / (self.limit * gain), math.inf)
        ratio = torch.where(median > 0, ratio, 0.0)
        return ratio, (count >= _FEWEST) & gain.isfinite()

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes: plain values."""
        return {
            "means": self._means.tolist(),
            "lowest": self._lowest.item(),
            "most": self._most.item(),
            "is_lowest": self._is_lowest.item(),
            "step": self._step,
            "heats": self._heats.tolist(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._means = self._means.new_tensor(state["means"])
        self._heats = self._heats.new_tensor(state["heats"])
        self._lowest = torch.full_like(self._lowest, state["lowest"])
        self._is_lowest = torch.full_like(self._is_lowest, state["is_lowest"])
        self._most = torch.full_like(self._most, state["most"])
        self._step = state["step"]
