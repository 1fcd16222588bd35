"""The first rate, and the first steps: searched for, and taken again where they were too long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._evaluators.prober import Look
from .._optimizers import Optimizers
from .search import Found, LookAt, search, search_again

__all__ = ["Calibration", "start_ratio"]

_CAUTION = 1 / 3  # the level after the first step, at most, in units of the rate that suits that step


class Calibration:
    """Decides the first level, and which of the first steps are to be taken again. It moves nothing itself.

    Args:
        steps: optimizer steps that are calibrated, the first of the training; 0 for none.
        factors: of the candidates of a search.

    Attributes:
        steps: as given.
    """

    def __init__(self, steps: int, factors: Sequence[float]):
        self.steps = steps
        self._factors = factors
        self._found = steps == 0
        self._lowest_cost = math.inf  # that a calibrated step ended at

    def is_searching(self, step: int) -> bool:
        """Whether the probe after ``step`` optimizer steps searches for the first level."""
        return not self._found and step <= self.steps

    def find_first(self, look: LookAt, lowest: float, highest: float, window: int = 0) -> Found:
        """Search the first step for the scale where the loss is lowest; once one is found, that was all.

        Args:
            look: at the candidates of that step.
            lowest: smallest ratio to the step that was taken.
            highest: largest ratio.
            window: steps that the line spans; of one, the cost before it may be known.
        """
        found = search(look, self._factors, lowest, highest)
        before = _before_the_last(found.seen) if window == 1 else math.nan
        if found.cost >= before - found.seen.precision * abs(before):
            found = found._replace(is_uphill=True)
        if not found.why_not:
            self._found = True
            self._lowest_cost = found.cost
        return found

    def find_again(self, look: LookAt, seen: Look, cost: Tensor, step: int, window: int) -> Found | None:
        """Find how long the last steps had better been, if the loss blew up in them; see :func:`search_again`.

        Args:
            look: at the candidates of these steps.
            seen: the last look.
            cost: 0-dim, about where the steps ended; it is read back, in the first steps alone.
            step: optimizer steps done.
            window: of these, how many were the last ones.

        Returns:
            ``None`` if the step is none of the first, or the loss did not blow up.
        """
        if step > self.steps:
            return None
        ended = cost.item()
        own = _before_the_last(seen)
        if math.isnan(own):
            found = search_again(look, self._factors, ended, self._lowest_cost)
        else:
            began = own if window == 1 else None
            found = search_again(look, self._factors, ended, min(self._lowest_cost, own), began)
        self._lowest_cost = min(self._lowest_cost, ended if found is None else found.cost)
        return found

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes."""
        return {"found": self._found, "lowest_cost": self._lowest_cost}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._found, self._lowest_cost = state["found"], state["lowest_cost"]


def _before_the_last(seen: Look) -> float:
    """Return the cost of the batch before the last step; not a number, to which nothing compares, if unknown."""
    return math.nan if seen.training is None else seen.training.own.item()


def start_ratio(optimizers: Optimizers, began_warm: bool) -> float:
    """Return the level to go on at after the first step, in units of the rate that suits that step.

    What suits the first step is too much for the next ones: its loss is the easiest to lower. A start too high may
    lose the network; one too low is made good by the next probes. With SGD's momentum, whose buffer is empty at
    first, later steps are 1 / (1 - momentum) times longer besides, and steadier; Adam corrects the bias of its
    first steps.

    Args:
        optimizers: SGD has ``dampening``, and others with a momentum have not.
        began_warm: whether the buffers held something before that step, as they do in a training that goes on.
    """
    momenta = [group["momentum"] for group in optimizers.param_groups if "dampening" in group]
    return 1.0 if began_warm else min(_CAUTION, 1.0 - max(momenta, default=0.0))
