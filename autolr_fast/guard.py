"""How high the level may be: no higher than where the training got on."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

__all__ = ["Guard", "GuardState"]


# By how much the losses must reach below all before for the level to go where it has not been:
_CLEAR = 2.0  # standard errors, and
_WORTH = 1e-3  # of all that they have fallen: what is left to win is worth no risk then


class GuardState(TypedDict):
    """What a guard goes on from: the last losses that it saw, the first, their lowest mean, and its ceiling."""

    losses: list[float]
    first: float
    lowest: float
    ceiling: float


class Guard:
    """Remembers the losses that probes saw, and lifts a ceiling over the level only while they reach new lows.

    The lines of a probe ask for a higher rate for as long as it lowers the loss of one batch, which it may do while
    the training gets nowhere: a small batch asks for steps that fit nothing but itself, in networks with BatchNorm
    weights grow with the rate and ask for more of it, and a network that has learned its examples by heart asks
    for more until it is lost. So the level goes above the highest one it has had only if the mean loss of the last
    probes is below that of as many before, and below the lowest such mean, by more than two standard errors, and by
    a thousandth of what the loss has fallen since the first probe. To win back what was lost is no new low. The
    level may fall at any time and come back: if it could fall only, noise would draw it down for as long as no
    progress is seen. Nothing here synchronises with the host.

    Args:
        count: probes in a mean, fewer at first: half of those there are, from the fourth on; 0 lets the level go
            anywhere.
        device: of the level.

    Example:
        >>> guard = Guard(2, torch.device("cpu"))
        >>> level = torch.tensor(1.0, dtype=torch.float64)
        >>> for loss in (4.0, 3.9, 2.0, 1.9, 2.1, 2.0):
        ...     level *= 2
        ...     falls = guard.hold(torch.tensor(loss), level)
        >>> level.item(), round(falls.item(), 1)  # held at the last two
        (16.0, -1.4)
    """

    def __init__(self, count: int, device: torch.device):
        self.count = count
        self._losses = torch.zeros(2 * count, dtype=torch.float64, device=device)
        self._seen = 0
        self._first = torch.full((), -math.inf, dtype=torch.float64, device=device)
        self._lowest = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._ceiling = torch.zeros((), dtype=torch.float64, device=device)

    def hold(self, loss: Tensor, level: Tensor) -> Tensor | None:
        """Add the loss of a probe, and put the level back to the ceiling, in place, if it is above and may not be.

        Args:
            loss: 0-dim, of the candidate nearest to the step as it was taken; lower is better.
            level: the level after the probe, 0-dim.

        Returns:
            By how many standard errors the losses fall, 0-dim, not a number if one is not finite;
            ``None`` while there are fewer than twice ``count``.
        """
        if self.count == 0:
            return None
        self._losses = torch.cat([self._losses[1:], loss.reshape(1).to(self._losses)])
        self._first = torch.where(self._first.isfinite() | ~loss.isfinite(), self._first, self._losses[-1])
        self._seen += 1
        half = min(self.count, self._seen // 2)
        if half < 2:
            self._ceiling = torch.maximum(self._ceiling, level)
            return None
        variances, (older, newer) = torch.var_mean(self._losses[-2 * half :].view(2, half), dim=1)
        error = (variances.sum() / half).sqrt()
        lowest = torch.minimum(self._lowest, older)
        won = lowest - newer
        gets_on = (won > _CLEAR * error) & (won > _WORTH * (self._first - newer))
        self._ceiling = torch.where(gets_on, torch.maximum(self._ceiling, level), self._ceiling)
        torch.minimum(level, self._ceiling, out=level)
        if half < self.count:
            return None
        self._lowest = torch.where(older.isfinite(), lowest, self._lowest)
        gain = older - newer
        return torch.where(gain == 0, gain, gain / error)

    def state(self) -> GuardState:
        """Return what :meth:`load` takes."""
        seen = self._losses[len(self._losses) - min(self._seen, len(self._losses)) :]
        return {
            "losses": seen.tolist(),
            "first": self._first.item(),
            "lowest": self._lowest.item(),
            "ceiling": self._ceiling.item(),
        }

    def check(self, state: GuardState) -> None:
        """Raise a ValueError if :meth:`load` cannot take a state; nothing is changed."""
        if set(state) != set(GuardState.__annotations__):
            raise ValueError(
                f"state_dict is of a guard with the keys {sorted(state)}, and this version's has "
                f"{sorted(GuardState.__annotations__)}: load it with the version of autolr_fast that saved it"
            )
        if len(state["losses"]) > 2 * self.count:
            raise ValueError(
                f"guard={self.count} keeps {2 * self.count} losses, and state_dict has {len(state['losses'])}: "
                "give AutoLR the guard that it had when it was saved"
            )

    def load(self, state: GuardState) -> None:
        """Take over what :meth:`state` returned, of a guard with the same count; :meth:`check` it first."""
        losses = state["losses"]
        self._seen = len(losses)
        kept = torch.tensor(losses, dtype=torch.float64, device=self._losses.device)
        self._losses = torch.cat([self._losses.new_zeros(len(self._losses) - len(losses)), kept])
        self._first.fill_(state["first"])
        self._lowest.fill_(state["lowest"])
        self._ceiling.fill_(state["ceiling"])
