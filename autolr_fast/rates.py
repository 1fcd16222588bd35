"""The level, and the learning rates that follow from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .annealing import Annealing, check_multiplier

__all__ = ["Rates"]


_SETTLING = 0.8  # what a probe with no progress leaves of the learning rate
_PROGRESS = 1.0  # standard errors by which the loss must fall for that


class Rates:
    """Learning rates of all param groups from one level: ``lr = base * level * anneal(step / total_steps)``.

    The level is one number for all groups, in units of each group's base. It is held inside the limits as a
    whole, so the groups keep their ratios there too. It lives on the device of the learning rates if these are
    tensors, so that following a probe needs no host synchronisation.

    Args:
        optimizer: its ``param_groups`` are read and written; tensor learning rates are filled, never replaced.
        annealing: from the fraction of training done to a multiplier.
        total_steps: optimizer steps of the whole training; ``None`` for a multiplier of 1.
        min_lr: lowest learning rate of any group.
        max_lr: highest learning rate of any group.

    Attributes:
        base: learning rate of each group at level 1.
        level: 0-dim float64.
        settled: what plateaus have left of the learning rate, 0-dim float64; 1 unless :meth:`settle` is called.

    Raises:
        ValueError: if a learning rate is not a positive number within the limits.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        annealing: Annealing,
        total_steps: int | None,
        min_lr: float,
        max_lr: float,
    ):
        self._optimizer = optimizer
        self._annealing = annealing
        self._total_steps = total_steps
        self._min_lr = float(min_lr)
        self._max_lr = float(max_lr)
        groups = optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self.base: list[float] = []
        for rate in rates:
            self._append(rate, scale=1.0)
        devices = {rate.device if isinstance(rate, Tensor) else torch.device("cpu") for rate in rates}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        self.level = torch.ones((), dtype=torch.float64, device=device)
        self.settled = torch.ones_like(self.level)

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest level (annealing included) at which every group is within its limits."""
        return self._min_lr / min(self.base), self._max_lr / max(self.base)

    def multiplier(self, step: int) -> float:
        """Return what annealing multiplies the level by after ``step`` optimizer steps."""
        if self._total_steps is None:
            return 1.0
        fraction = min(1.0, step / self._total_steps)
        multiplier = self._annealing(fraction)
        check_multiplier(self._annealing, fraction, multiplier)
        return float(multiplier)

    def annealed(self, step: int) -> Tensor | float:
        """Return the level after ``step`` optimizer steps, annealed and within the limits.

        Returns:
            A number if the level is on the CPU, where one is had at a tenth of the time; else 0-dim.
        """
        level, settled = (each.item() if each.is_cpu else each for each in (self.level, self.settled))
        return _within(level * settled * self.multiplier(step), *self.limits)

    def set_level(self, level: Tensor | float) -> None:
        """Set the level, held inside the limits."""
        self.level = torch.as_tensor(level, dtype=torch.float64, device=self.level.device).clamp(*self.limits)

    def settle(self, before: Tensor, falls: Tensor | None) -> None:
        """Anneal where no length of the training is known: a fifth less at each probe while the loss does not fall.

        The less is left of the learning rate, the less the level moves, so that it does not climb against it.

        Args:
            before: the level before the probe, 0-dim.
            falls: by how many standard errors the loss falls, 0-dim; ``None`` or not a number if that is not known.
        """
        self.level.copy_(before * (self.level / before) ** self.settled)
        if falls is not None:
            self.settled = torch.where(falls <= _PROGRESS, _SETTLING * self.settled, self.settled)

    def apply(self, step: int) -> None:
        """Write the learning rates after ``step`` optimizer steps into the param groups."""
        annealed = self.annealed(step)
        for group, base in zip(self._optimizer.param_groups, self.base, strict=True):
            lr = _within(base * annealed, self._min_lr, self._max_lr)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def current(self) -> list[float | Tensor]:
        """Return the learning rates in the param groups; tensors as copies."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def adopt_new_groups(self, step: int) -> None:
        """Give groups that were added to the optimizer a base: from now on their ratio to the others holds."""
        groups = self._optimizer.param_groups
        if len(groups) < len(self.base):
            raise ValueError(
                f"the optimizer has {len(groups)} param groups and had {len(self.base)}: groups can be added, not "
                "removed; freeze their parameters with requires_grad_(False) instead"
            )
        for group in groups[len(self.base) :]:
            self._append(group["lr"], scale=float(self.annealed(step)))
            group.setdefault("initial_lr", self.base[-1])

    def _append(self, rate: float | Tensor, scale: float) -> None:
        index = len(self.base)
        if isinstance(rate, Tensor):
            if rate.numel() != 1:
                raise ValueError(f"lr of param group {index} has shape {list(rate.shape)}: use a 0-dim tensor")
            if rate.requires_grad or rate.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"lr of param group {index} is a {rate.dtype} tensor with requires_grad={rate.requires_grad}: "
                    "it is written in place, so use a float32 or float64 one that requires no gradient"
                )
        value = float(rate)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"lr={value} of param group {index} is not positive and finite: give it any positive rate; to "
                "freeze its parameters use requires_grad_(False) as well"
            )
        if not self._min_lr <= value <= self._max_lr:
            raise ValueError(
                f"lr={value} of param group {index} is outside min_lr={self._min_lr} .. max_lr={self._max_lr}: "
                "change lr or the limit"
            )
        self.base.append(value / scale)


def _within(value: Tensor | float, lowest: float, highest: float) -> Tensor | float:
    """Return the value, or the limit that it is beyond."""
    return value.clamp(lowest, highest) if isinstance(value, Tensor) else min(max(value, lowest), highest)
