"""How high the level may be: no higher than where the training got on."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

__all__ = ["Guard", "GuardState"]


_CLEAR = 2.0  # standard errors by which the losses must fall for the level to go where it has not been


class GuardState(TypedDict):
    """What a guard goes on from: the last losses that it saw, and its ceiling."""

    losses: list[float]
    ceiling: float


class Guard:
    """Remembers the losses that probes saw, and lifts a ceiling over the level only while they clearly fall.

    The lines of a probe ask for a higher rate for as long as it lowers the loss of one batch, which it may do while
    the training gets nowhere: a small batch asks for steps that fit nothing but itself, and in networks with
    BatchNorm, weights grow with the rate and ask for more of it. So the level goes above the highest one it has had
    only if the mean loss of the last probes is below that of as many before by more than two standard errors. It
    may fall at any time and come back: if it could fall only, noise would draw it down for as long as no progress
    is seen. Nothing here synchronises with the host.

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
        self._seen += 1
        half = min(self.count, self._seen // 2)
        if half < 2:
            self._ceiling = torch.maximum(self._ceiling, level)
            return None
        variances, (older, newer) = torch.var_mean(self._losses[-2 * half :].view(2, half), dim=1)
        error = (variances.sum() / half).sqrt()
        gain = older - newer
        falls = torch.where(gain == 0, gain, gain / error)
        self._ceiling = torch.where(falls > _CLEAR, torch.maximum(self._ceiling, level), self._ceiling)
        torch.minimum(level, self._ceiling, out=level)
        return falls if half == self.count else None

    def state(self) -> GuardState:
        """Return the losses of the last probes and the ceiling."""
        seen = self._losses[len(self._losses) - min(self._seen, len(self._losses)) :]
        return {"losses": seen.tolist(), "ceiling": self._ceiling.item()}

    def load(self, state: GuardState) -> None:
        """Take over what :meth:`state` returned, of a guard with the same count."""
        losses = state["losses"]
        self._seen = len(losses)
        kept = torch.tensor(losses, dtype=torch.float64, device=self._losses.device)
        self._losses = torch.cat([self._losses.new_zeros(len(self._losses) - len(losses)), kept])
        self._ceiling.fill_(state["ceiling"])
