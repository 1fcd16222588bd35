"""Whether the level may rise: only while the training gets on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Guard"]


_CLEAR = 2.0  # standard errors by which the losses must fall for the level to rise


class Guard:
    """Remembers the losses that probes saw, and holds the level back while they do not clearly fall.

    The lines of a probe ask for a higher rate for as long as it lowers the loss of one batch, which it may do while
    the training gets nowhere: a small batch asks for steps that fit nothing but itself, and in networks with
    BatchNorm, weights grow with the rate and ask for more of it. So the level rises only if the mean loss of the
    last probes is below that of as many before by more than two standard errors. It may fall at any time. Nothing
    here synchronises with the host.

    Args:
        count: probes in a mean, fewer at first: half of those there are, from the fourth on; 0 lets the level go
            anywhere.
        device: of the level.

    Example:
        >>> guard = Guard(2, torch.device("cpu"))
        >>> level = torch.tensor(1.0, dtype=torch.float64)
        >>> for loss in (4.0, 3.9, 2.0, 1.9, 2.1, 2.0):
        ...     before = level.clone()
        ...     level *= 2
        ...     falls = guard.hold(torch.tensor(loss), before, level)
        >>> level.item(), round(falls.item(), 1)  # held at the last two
        (16.0, -1.4)
    """

    def __init__(self, count: int, device: torch.device):
        self.count = count
        self._losses = torch.zeros(2 * count, dtype=torch.float64, device=device)
        self._seen = 0

    def hold(self, loss: Tensor, before: Tensor, level: Tensor) -> Tensor | None:
        """Add the loss of a probe, and put the level back in place if it rose and may not.

        Args:
            loss: 0-dim, of the step as it was taken; lower is better.
            before: the level before the probe, 0-dim.
            level: the level after it, 0-dim.

        Returns:
            By how many standard errors the losses fall, 0-dim, not a number if one is not finite or all are equal;
            ``None`` while there are fewer than twice ``count``.
        """
        if self.count == 0:
            return None
        self._losses = torch.cat([self._losses[1:], loss.reshape(1).to(self._losses)])
        self._seen += 1
        half = min(self.count, self._seen // 2)
        if half < 2:
            return None
        older, newer = self._losses[-2 * half : -half], self._losses[-half:]
        error = ((older.var() + newer.var()) / half).sqrt()
        falls = (older.mean() - newer.mean()) / error
        level.copy_(torch.where(falls > _CLEAR, level, torch.minimum(level, before)))
        return falls if half == self.count else None

    def state(self) -> list[float]:
        """Return the losses of the last probes."""
        return self._losses[len(self._losses) - min(self._seen, len(self._losses)) :].tolist()

    def load(self, losses: Sequence[float]) -> None:
        """Take over what :meth:`state` returned, of a guard with the same count."""
        self._seen = len(losses)
        kept = torch.tensor(losses, dtype=torch.float64, device=self._losses.device)
        self._losses = torch.cat([self._losses.new_zeros(len(self._losses) - len(losses)), kept])
