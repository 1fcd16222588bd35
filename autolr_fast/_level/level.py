"""The level, and the learning rates that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._arguments import check_count, check_limits
from .._optimizers import Optimizers
from .annealing import Annealing, check_multiplier, resolve_annealing
from .heat import Heat
from .held_back import HeldBack

__all__ = ["Level"]

_LOWEST_RETAKEN = 1 / 2  # of the level, what steps that are taken again leave at least
_CEILING = 0.8  # of the level at which a training was lost: diffusion with SGD was lost there again
_HEALING = 1.03  # by which that ceiling rises with each probe: without, diffusion with momentum ends 4 % worse


class Level:
    """Learning rates of all param groups from one level: ``lr = base * level * anneal(step / total_steps)``.

    Nothing else writes the level or the learning rates. The level is one number for all groups, in units of each
    group's base. The limits hold the rate of each group alone; a group whose base is 0 stays there. Where learning
    rates are tensors, the level is on their device, and following a probe needs no host synchronisation.

    A base is the ``initial_lr`` of a group, if another scheduler has left one, as with torch's schedulers, else its
    ``lr``. The ``initial_lr`` becomes the rate of the group before annealing: a later scheduler starts there.

    Args:
        optimizers: their param groups are read and written; tensor learning rates are filled, never replaced.
        anneal: as in :class:`~autolr_fast.AutoLR`.
        total_steps: optimizer steps of the whole training; ``None`` for a multiplier of 1.
        lr_limits: lowest and highest learning rate of any group.
        max_heat: as in :class:`~autolr_fast.AutoLR`.

    Attributes:
        base: learning rate of each group at level 1; groups that came later have none until :meth:`add_groups`.
        value: the level, 0-dim float64.
        limits: lowest and highest level, annealing included: beyond them every group is at a limit of its own.
        total_steps: as given.
        heat: what holds the level.
        held_back: what the losses on examples held back say.

    Raises:
        TypeError: if an argument is of a kind that cannot be meant.
        ValueError: if a learning rate is not within the limits, or all are 0, or an argument cannot be meant.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        anneal: str | Annealing,
        total_steps: int | None,
        lr_limits: tuple[float, float],
        max_heat: float,
    ):
        if total_steps is not None:
            check_count("total_steps", total_steps, at_least=1)
        self._optimizers = optimizers
        self._annealing = resolve_annealing(anneal)
        self.total_steps = total_steps
        self.held_back = HeldBack()
        self._lr_limits = check_limits(lr_limits)
        self.base: list[float] = []
        self._written: list[tuple[float | Tensor, int]] = []  # the rate of each group, and its version
        self._step = 0
        self._told = False  # that something else writes them
        rates = [group["lr"] for group in optimizers.param_groups]
        devices = {rate.device if isinstance(rate, Tensor) else torch.device("cpu") for rate in rates}
        device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        self._known: float | None  # the value as a number, where that takes no waiting
        self._take(torch.ones((), dtype=torch.float64, device=device))
        self._ceiling = torch.full_like(self.value, math.inf)
        self.heat = Heat(max_heat, device)
        self.limits = self._lr_limits
        self.add_groups()
        if not any(self.base):
            raise ValueError("the lr of all param groups is 0, which no level can scale: give at least one its own")

    def highest_ratio(self, rates: Iterable[float]) -> float:
        """Return by how much these rates can be multiplied before the first is at its upper limit."""
        return self._lr_limits[1] / max(rates)

    def has_new_groups(self) -> bool:
        """Whether groups were added to the optimizer that have no base yet."""
        return len(self._optimizers.places()) > len(self.base)

    def new_groups(self) -> list[dict[str, Any]]:
        """Return the groups that have no base yet."""
        return self._optimizers.param_groups[len(self.base) :]

    def multiplier(self, step: int) -> float:
        """Return what annealing multiplies the level by after ``step`` optimizer steps."""
        began = self.held_back.began
        if began is None or step <= began:
            return self._ordinary(step)
        return min(self._ordinary(step), self._ordinary(began) * self.held_back.left(step))

    def has_ended(self, step: int) -> bool:
        """Whether annealing has come to its end after ``step`` optimizer steps."""
        total, end = self.total_steps, self.held_back.end
        return (total is not None and step >= total) or (end is not None and step >= end)

    def _ordinary(self, step: int) -> float:
        """Return what the annealing that was asked for multiplies the level by."""
        if self.total_steps is None:
            return 1.0
        fraction = min(1.0, step / self.total_steps)
        multiplier = self._annealing(fraction)
        check_multiplier(self._annealing, fraction, multiplier)
        return float(multiplier)

    def annealed(self, step: int) -> Tensor | float:
        """Return the level after ``step`` optimizer steps, annealed and within the limits.

        Returns:
            A number if the level is on the CPU, where one is had at a tenth of the time; else 0-dim.
        """
        return _within(self._quick_value() * self.multiplier(step), *self.limits)

    def current(self) -> float:
        """Return the level as it was last applied, annealed and within the limits."""
        return float(self.annealed(self._step))

    def start_at(self, value: Tensor | float) -> None:
        """Begin at a level that was searched for."""
        self._set(torch.as_tensor(value, dtype=torch.float64, device=self.value.device))

    def follow(self, factor: Tensor, step: int, due: int = 1) -> Tensor:
        """Move the level by what a probe found, as far as the heat lets it go.

        Args:
            factor: 0-dim, what the last step asks for.
            step: optimizer steps done.
            due: probes since the last one that was made, with this one.

        Returns:
            By how much the level moved, 0-dim. The logarithm of the move is scaled by the annealing multiplier, so
            that the level does not climb against it.
        """
        before = self.value
        self._ceiling = self._ceiling * _HEALING**due
        moved = self.heat.temper(factor, due) ** self.multiplier(step)
        self._set(torch.minimum(before * moved, self._ceiling))
        moved = self.value / before
        self.heat.rescale(moved)
        return moved

    def fall(self, retaken: float, with_ceiling: bool) -> None:
        """Lower the level after steps that blew up the loss.

        Args:
            retaken: at how many times their rate these steps were taken again: as much is left of the level, half
                of it at least.
            with_ceiling: whether the next probes are to leave the level clearly below where it was.
        """
        before = self.value
        if with_ceiling:
            self._ceiling = _CEILING * before
        self._set(torch.minimum(before * max(retaken, _LOWEST_RETAKEN), self._ceiling))
        self.heat.rescale(self.value / before)

    def apply(self, step: int) -> None:
        """Write the learning rates after ``step`` optimizer steps into the param groups."""
        self._step = step
        annealed = self.annealed(step)
        groups = self._optimizers.param_groups[: len(self.base)]
        for group, base in zip(groups, self.base, strict=True):
            _write(group, self._rate(base, annealed))
        self._written = [_stamp(group["lr"]) for group in groups]

    def reclaim(self) -> str:
        """Put back the learning rates that something else wrote since; return what to tell the user of it.

        Nothing is read back from an accelerator while nothing else writes. Once annealing has ended others may.
        """
        if self.has_ended(self._step):
            return ""
        known = zip(self._optimizers.param_groups, self._written, strict=False)  # new groups have no base yet
        changed = [
            index
            for index, (group, (written, version)) in enumerate(known)
            if (rate := group["lr"]) is not written or (isinstance(rate, Tensor) and rate._version != version)
        ]
        if changed and self._optimizers.is_making_states():
            return ""
        messages = [self._put_back(index, self._optimizers.param_groups[index]) for index in changed]
        return next(filter(None, reversed(messages)), "")

    def _put_back(self, index: int, group: dict[str, Any]) -> str:
        found = float(group["lr"])
        _write(group, self._rate(self.base[index], self.annealed(self._step)))
        self._written[index] = _stamp(group["lr"])
        wanted = float(group["lr"])
        if found == wanted or self._told:
            return ""
        self._told = True
        return (
            f"the lr of {self._optimizers.group_name(index)} was {found:.6g} before optimizer.step(), and AutoLR "
            f"had set {wanted:.6g}: something else writes it, such as another scheduler, a warm-up in the loop, or "
            "a state that the optimizer loaded alone. AutoLR puts its own back; remove the other, and load "
            "AutoLR's state after the optimizer's"
        )

    def _rate(self, base: float, annealed: Tensor | float) -> Tensor | float:
        return _within(base * annealed, *self._lr_limits) if base else 0.0

    def of_groups(self) -> list[float | Tensor]:
        """Return the rate of each group before annealing; of one that has no base yet, its ``lr``."""
        value = self._quick_value()
        return [*(self._rate(base, value) for base in self.base), *(group["lr"] for group in self.new_groups())]

    def overrun(self, step: int) -> str:
        """Return what to tell the user if ``step`` is past the end of annealing."""
        end = self.held_back.end  # which a loop may see at its next evaluation alone
        if (
            end is not None
            and step > end + self.held_back.interval
            and (self.total_steps is None or end < self.total_steps)
        ):
            return (
                f"training goes on past step {end}, where the annealing that scheduler.watch began has ended and "
                "the learning rate is at its lowest: stop when scheduler.has_ended"
            )
        if self.total_steps is None or step <= self.total_steps:
            return ""
        return (
            f"training goes on past total_steps={self.total_steps}, where annealing has ended and the learning "
            "rate is at its lowest: pass the number of optimizer steps of the whole training"
        )

    def rates(self) -> list[float | Tensor]:
        """Return the learning rates in the param groups; tensors as copies."""
        rates = [group["lr"] for group in self._optimizers.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def add_groups(self, scale: float | None = None) -> None:
        """Give a base to the groups that have none, or to none of them.

        Args:
            scale: by how much their rate is to differ from their ``lr``, annealing included. ``None`` for a rate in
                proportion to those the optimizer began with, as if they had been there from the start.

        Raises:
            ValueError: if a learning rate is not within the limits.
        """
        unit = 1.0 if scale is None else scale / self.current()
        first = len(self.base)
        rates = [_start_of(group, is_new=scale is not None) for group in self.new_groups()]
        bases = [self._checked(rate, first + index) * unit for index, rate in enumerate(rates)]
        self.base += bases
        self._find_limits()
        self._written += map(_stamp, rates)
        self._set(self.value)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes: plain values."""
        return {
            "base_lrs": list(self.base),
            "value": self.value.item(),
            "ceiling": self._ceiling.item(),
            "heat": self.heat.state(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise a ValueError if :meth:`load` cannot take a state; nothing is changed."""
        groups, saved = len(self._optimizers.param_groups), len(state["base_lrs"])
        if saved > groups:
            raise ValueError(
                f"state_dict is of {saved} param groups and the optimizer has {groups}: give the optimizer the "
                "same groups before loading"
            )

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned; :meth:`check` it first."""
        self.base[:] = state["base_lrs"]
        self._find_limits()
        self._take(torch.full_like(self.value, state["value"]))
        self._ceiling = torch.full_like(self.value, state["ceiling"])
        self.heat.load(state["heat"])

    def _take(self, value: Tensor) -> None:
        self.value = value
        self._known = value.item() if value.is_cpu else None

    def _quick_value(self) -> Tensor | float:
        """Return the level, as a number where that takes no waiting."""
        return self.value if self._known is None else self._known

    def _find_limits(self) -> None:
        if moving := [base for base in self.base if base]:
            lowest, highest = self._lr_limits
            self.limits = lowest / max(moving), highest / min(moving)

    def _set(self, level: Tensor) -> None:
        self._take(level.clamp(*self.limits) if any(self.base) else level)
        for group, rate in zip(self._optimizers.param_groups, self.of_groups(), strict=True):
            group["initial_lr"] = _like(group["lr"], rate)

    def _checked(self, rate: float | Tensor, index: int) -> float:
        name = self._optimizers.group_name(index)
        if isinstance(rate, Tensor):
            if rate.numel() != 1:
                raise ValueError(f"the lr of {name} has shape {list(rate.shape)}: use a 0-dim tensor")
            if rate.requires_grad or rate.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"the lr of {name} is a {rate.dtype} tensor with requires_grad={rate.requires_grad}: "
                    "it is written in place, so use a float32 or float64 one that requires no gradient"
                )
        value = float(rate)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"lr={value} of {name} is no finite number of 0 or more: give it any positive rate")
        if not self.base and value and not self._lr_limits[0] <= value <= self._lr_limits[1]:
            limits = f"lr_limits={self._lr_limits}"
            raise ValueError(f"lr={value} of {name} is outside {limits}: change lr or the limits")
        return value


def _start_of(group: dict[str, Any], is_new: bool) -> float | Tensor:
    """Return the rate that a group begins at: that before annealing, if it had some, as with torch's schedulers."""
    rate: float | Tensor = group["lr"] if is_new else group.get("initial_lr", group["lr"])
    return rate


def _like(lr: float | Tensor, rate: float | Tensor) -> float | Tensor:
    """Return a rate as a tensor where ``lr`` is one: a compiled step takes each number beside it for a constant."""
    return torch.as_tensor(rate, dtype=torch.float64, device=lr.device) if isinstance(lr, Tensor) else rate


def _write(group: dict[str, Any], rate: Tensor | float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _stamp(rate: float | Tensor) -> tuple[float | Tensor, int]:
    """Return what shows whether a learning rate was written to: it, and its version if it is a tensor."""
    return rate, rate._version if isinstance(rate, Tensor) else 0


def _within(value: Tensor | float, lowest: float, highest: float) -> Tensor | float:
    """Return the value, or the limit that it is beyond."""
    return value.clamp(lowest, highest) if isinstance(value, Tensor) else min(max(value, lowest), highest)
