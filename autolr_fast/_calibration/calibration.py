"""The first rate, and the first steps: searched for, and taken again where they were too long."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .._evaluators.prober import Look
from .search import Found, LookAt, has_blown_up, has_risen, search, search_again

__all__ = ["Calibration", "start_ratio"]

_CAUTION = 1 / 3  # the level after the first step, at most, in units of the rate that suits that step
_LOST = 0.5  # of all that the loss has fallen: steps that raise it by more are taken again, and
_LEAST = 0.25  # of its size: noise raises it by less


class Calibration:
    """Decides the first level, and which of the first steps are to be taken again. It moves nothing itself.

    Args:
        steps: optimizer steps that are calibrated, the first of the training; 0 for none.
        at_once: candidates of a look in a search.

    Attributes:
        steps: as given.
    """

    def __init__(self, steps: int, at_once: int):
        self.steps = steps
        self._at_once = at_once
        self._found = steps == 0
        self._lowest_cost = math.inf  # that a calibrated step ended at
        self._first_mean = self._lowest_mean = math.nan  # of the losses between probes

    def is_searching(self, step: int) -> bool:
        """Whether the probe after ``step`` optimizer steps searches for the first level."""
        return not self._found and step <= self.steps

    @property
    def has_found(self) -> bool:
        """Whether a first step was searched, so that the rates the optimizer began with mean nothing any more."""
        return self._found and self.steps > 0

    def find_first(self, look: LookAt, step: float, begin: float, highest: float, is_known: bool) -> Found:
        """Search the first step for the scale where the loss is lowest; once it has one, or has none, that was all.

        Args:
            look: at the candidates of that step.
            step: length of that step.
            begin: length of the parameters where it began.
            highest: largest ratio at which it may be taken.
            is_known: whether the loss where it began is.
        """
        found = search(look, self._at_once, step, begin, highest=highest, is_known=is_known)
        if found.is_endless or not found.why_not:
            self._found = True
            self._lowest_cost = found.cost
        return found

    def find_for_groups(self, look: LookAt, step: float, begin: float, highest: float, is_known: bool) -> Found:
        """Search the first step of groups that came later, along their part of it; arguments as above."""
        return search(look, self._at_once, step, begin, highest=highest, is_known=is_known)

    def find_again(self, look: LookAt, seen: Look, cost: Tensor, window: int) -> Found | None:
        """Find how long the last steps had better been, if the loss blew up in them; see :func:`search_again`.

        Args:
            look: at the candidates of these steps.
            seen: the last look.
            cost: 0-dim, about where the steps ended; it is read back, in the first steps alone.
            window: how many steps these are.

        Returns:
            ``None`` if the loss did not blow up.
        """
        ended = cost.item()
        own = math.nan if seen.training is None else seen.training.own.item()  # of the batch, before the last step
        did_no_harm = window == 1 and math.isfinite(own) and not has_risen(ended, own)
        before = self._lowest_cost if math.isnan(own) else min(self._lowest_cost, own)
        found = None if did_no_harm else search_again(look, ended, before)
        self._lowest_cost = min(self._lowest_cost, ended if found is None else found.cost)
        return found

    def see(self, mean: float) -> None:
        """See the mean loss of the steps since the last probe, as a cost; one that is not finite says nothing."""
        self._first_mean, self._lowest_mean = self._means_with(mean)

    def may_be_lost(self, cost: float, mean: float, is_close: bool) -> bool:
        """Whether the loss of a batch that no step has seen says that the last steps had better be looked at.

        Args:
            cost: where the last step began.
            mean: what :meth:`see` will see of the last steps.
            is_close: whether these are among the first.
        """
        if is_close:
            return has_blown_up(cost, self._lowest_cost)
        first, lowest = self._means_with(mean)
        return has_blown_up(cost, lowest, self._most_to_lose(first, lowest))

    def is_above_start(self, cost: float) -> bool:
        """Whether the loss of a batch that no step has seen is higher than the first one was."""
        return cost > self._first_mean

    def _most_to_lose(self, first: float, lowest: float) -> float:
        return max(_LOST * (first - lowest), _LEAST * abs(lowest))

    def find_later(self, look: LookAt, cost: float, mean: float) -> Found | None:
        """Find how long the last steps had better been, if they lost half of what the training has won.

        Args:
            look: at the candidates of these steps, after the first ones.
            cost: about where they ended.
            mean: what :meth:`see` will see of them.

        Returns:
            ``None`` if they did not.
        """
        first, lowest = self._means_with(mean)
        most = self._most_to_lose(first, lowest)
        return search_again(look, cost, lowest, most) if first > lowest else None

    def _means_with(self, mean: float) -> tuple[float, float]:
        """Return the first and the lowest mean once another is seen."""
        if not math.isfinite(mean):
            return self._first_mean, self._lowest_mean
        if math.isnan(self._first_mean):
            return mean, mean
        return self._first_mean, min(mean, self._lowest_mean)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes."""
        return {
            "found": self._found,
            "lowest_cost": self._lowest_cost,
            "first_mean": self._first_mean,
            "lowest_mean": self._lowest_mean,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._found, self._lowest_cost = state["found"], state["lowest_cost"]
        self._first_mean, self._lowest_mean = state["first_mean"], state["lowest_mean"]


def start_ratio(groups: Iterable[Mapping[str, Any]], began_warm: bool = False) -> float:
    """Return the rate to go on at after the first step, in units of the rate that suits that step.

    What suits the first step is too much for the next ones: its loss is the easiest to lower. A start too high may
    lose the network; one too low is made good by the next probes. With SGD's momentum, whose buffer is empty at
    first, later steps are 1 / (1 - momentum) times longer besides, and steadier; Adam corrects the bias of its
    first steps.

    Args:
        groups: param groups; SGD's have ``dampening``, and those of others with a momentum have not.
        began_warm: whether the buffers held something before that step, as they do in a training that goes on.
    """
    momenta = [group["momentum"] for group in groups if "dampening" in group]
    return 1.0 if began_warm else min(_CAUTION, 1.0 - max(momenta, default=0.0))
