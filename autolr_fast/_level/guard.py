"""How high the level may be: no higher than where the training got on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._arguments import check_count

__all__ = ["Guard"]


# By how much the losses must reach below all before for the level to go where it has not been:
_CLEAR = 2.0  # standard errors, and
_WORTH = 1e-3  # of all that they have fallen: what is left to win is worth no risk then
# By how much the mean loss must rise from one probe to the next for the training to be about to be lost:
_ALARM = 3.0  # standard errors, and
_LOST = 0.2  # of all that it has fallen
_BRAKED = 0.5  # what that leaves of the level


class Guard:
    """Remembers the losses that probes saw, and lifts a ceiling over the level only while they reach new lows.

    The lines of a probe ask for a higher rate for as long as it lowers the loss of one batch, which it may do while
    the training gets nowhere: a small batch asks for steps that fit nothing but itself, in networks with BatchNorm
    weights grow with the rate and ask for more of it, and a network that has learned its examples by heart asks
    for more until it is lost. So the level goes above the highest one it has had only if the mean loss of the last
    probes is below that of as many before, and below the lowest such mean, by more than two standard errors, and by
    a thousandth of what the loss has fallen since the first probe. To win back what was lost is no new low. The
    level may fall at any time and come back: if it could fall only, noise would draw it down for as long as no
    progress is seen.

    A training that is about to be lost shows between probes: where all losses are known, the level is halved if
    their mean has risen since the probe before by more than three standard errors, and by more than a fifth of what
    it has fallen since the first. Nothing here synchronises with the host.

    Args:
        probes: in a mean; fewer at first: half of those there are, from the fourth on. 0 for no guard.
        device: of the level.

    Raises:
        TypeError: if ``probes`` is not a whole number.
        ValueError: if so many probes cannot guard.

    Example:
        >>> guard = Guard(2, torch.device("cpu"))
        >>> level = torch.tensor(1.0, dtype=torch.float64)
        >>> for loss in (4.0, 3.9, 2.0, 1.9, 2.1, 2.0):
        ...     level, falls = guard.hold(2 * level, torch.tensor(loss))
        >>> level.item(), round(falls.item(), 1)  # held at the last two
        (16.0, -1.4)
    """

    def __init__(self, probes: int, device: torch.device):
        check_count("guard_probes", probes, at_least=0, of="probes")
        if probes == 1:
            raise ValueError("guard_probes=1: one probe has no standard error; give 2 or more, or 0 for no guard")
        self._probes = probes
        self._losses = torch.zeros(2 * probes, dtype=torch.float64, device=device)
        self._seen = 0
        self._first = torch.full((), -math.inf, dtype=torch.float64, device=device)
        self._lowest = torch.full((), math.inf, dtype=torch.float64, device=device)
        self._ceiling = torch.zeros((), dtype=torch.float64, device=device)
        self._variance = torch.full((), math.inf, dtype=torch.float64, device=device)  # of the last loss

    def hold(self, wanted: Tensor, loss: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Add the loss of a probe, and return the level that it allows.

        Args:
            wanted: the level that the probe asks for, 0-dim.
            loss: 0-dim, lower is better: the mean over all steps since the last probe, or that of one candidate.
            variance: 0-dim, of such a mean.

        Returns:
            ``(level, falls)``: the wanted level or, if that is above and may not be, the ceiling, and half of that
            if the training is about to be lost; and by how many standard errors the losses fall, 0-dim, not a
            number if one is not finite, ``None`` while there are fewer than twice ``probes``.
        """
        if self._probes == 0:
            return wanted, None
        left = torch.where(self._is_about_to_be_lost(loss), _BRAKED, 1.0)
        unknown = torch.full_like(self._variance, math.inf)
        self._variance = unknown if variance is None else torch.where(variance.isfinite(), variance, unknown)
        self._losses = torch.cat([self._losses[1:], loss.reshape(1).to(self._losses)])
        self._first = torch.where(self._first.isfinite() | ~loss.isfinite(), self._first, self._losses[-1])
        self._seen += 1
        half = min(self._probes, self._seen // 2)
        if half < 2:
            self._ceiling = torch.maximum(self._ceiling, wanted)
            return left * wanted, None
        variances, (older, newer) = torch.var_mean(self._losses[-2 * half :].view(2, half), dim=1)
        error = (variances.sum() / half).sqrt()
        lowest = torch.minimum(self._lowest, older)
        fallen = lowest - newer
        is_new_low = (fallen > _CLEAR * error) & (fallen > _WORTH * (self._first - newer))
        self._ceiling = torch.where(is_new_low, torch.maximum(self._ceiling, wanted), self._ceiling)
        level = left * torch.minimum(wanted, self._ceiling)
        if half < self._probes:
            return level, None
        self._lowest = torch.where(older.isfinite(), lowest, self._lowest)
        gain = older - newer
        return level, torch.where(gain == 0, gain, gain / error)

    def _is_about_to_be_lost(self, loss: Tensor) -> Tensor:
        rise, fallen = loss - self._losses[-1], self._first - self._losses[-1]
        return (rise > _ALARM * (2 * self._variance).sqrt()) & (rise > _LOST * fallen)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes: the last losses, the first, their lowest mean, and the ceiling."""
        seen = self._losses[len(self._losses) - min(self._seen, len(self._losses)) :]
        return {
            "losses": seen.tolist(),
            "first": self._first.item(),
            "lowest": self._lowest.item(),
            "ceiling": self._ceiling.item(),
            "variance": self._variance.item(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise a ValueError if :meth:`load` cannot take a state; nothing is changed."""
        if len(state["losses"]) > 2 * self._probes:
            raise ValueError(
                f"guard_probes={self._probes} keeps {2 * self._probes} losses, and state_dict has "
                f"{len(state['losses'])}: give AutoLR the guard_probes that it had when it was saved"
            )

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned, of a guard of as many probes; :meth:`check` it first."""
        losses = state["losses"]
        self._seen = len(losses)
        kept = torch.tensor(losses, dtype=torch.float64, device=self._losses.device)
        self._losses = torch.cat([self._losses.new_zeros(len(self._losses) - len(losses)), kept])
        self._first.fill_(state["first"])
        self._lowest.fill_(state["lowest"])
        self._ceiling.fill_(state["ceiling"])
        self._variance = torch.full_like(self._variance, state["variance"])
