"""What is done as a step begins and ends: windows open, and what moves for the first time is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._machine.ranks import is_distributed
from .._optimizers import Optimizers
from .schedule import ProbeSchedule
from .snapshots import Snapshots
from .writes import Writes

__all__ = ["StepHooks"]


class StepHooks:
    """Is called before and after each step of the optimizers, and around its probe.

    Parameters that move for the first time after calibration have a first step of their own. That of param groups
    that were added is searched. Others, which were frozen, are watched for as many steps as calibration takes.

    Args:
        optimizers: whose steps begin and end.
        schedule: of the probes; close probes are asked of it here.
        snapshots: keep where lines begin.
        is_searching_groups: whether an added group waits for a search, and takes part in this step.
        tell: warns the user.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        schedule: ProbeSchedule,
        snapshots: Snapshots,
        is_searching_groups: Callable[[], bool],
        tell: Callable[[str], None],
    ):
        self._optimizers = optimizers
        self._schedule = schedule
        self._snapshots = snapshots
        self._is_searching_groups = is_searching_groups
        self._tell = tell
        self._writes = Writes(optimizers)
        self._frozen = {parameter for parameter in optimizers.parameters if not parameter.requires_grad}

    def may_be_first(self) -> bool:
        """Whether parameters that were frozen so far may move in the step to come."""
        return any(parameter.requires_grad for parameter in self._frozen)

    def before_step(self, done: int) -> None:
        """Open the windows of the step after so many."""
        is_searched = self._is_searching_groups()
        if self._frozen and self.may_be_first() and done and not is_searched:
            self._schedule.close_from = done
            self._schedule.searched_step = done + 1
            self._writes.forget()
            if 0 < self._schedule.first_steps <= done:
                self._tell(_UNFROZEN)
        self._frozen = {each for each in self._optimizers.parameters if not each.requires_grad}
        if is_searched:
            self._schedule.searched_step = done + 1
        if self._watches(done + 1) and self._writes.before_step():
            self._snapshots.drop_all()
            self._tell(_SET_BY_OTHERS)
        self._snapshots.keep(done)

    def after_step(self, done: int) -> None:
        """See where the step ended that was one of so many."""
        if self._watches(done):
            self._writes.after_step()

    def before_probe(self, done: int) -> None:
        """Tell if something is wrong with the step that is to be probed."""
        if self._watches(done):
            self._tell(self._writes.before_probe())

    def leave(self, done: int, has_retaken: bool) -> None:
        """See where AutoLR left the parameters."""
        if self._watches(done):
            self._writes.leave(has_retaken)

    def state(self) -> dict[str, Any]:
        """Return what :meth:`load` takes."""
        parameters = enumerate(self._optimizers.parameters)
        return {
            "close_from": self._schedule.close_from,
            "searched_step": self._schedule.searched_step,
            "frozen": [index for index, parameter in parameters if parameter in self._frozen],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned for the same parameters."""
        parameters = self._optimizers.parameters
        self._schedule.close_from, self._schedule.searched_step = state["close_from"], state["searched_step"]
        self._frozen = {parameters[index] for index in state["frozen"]}
        self._writes.forget()

    def _watches(self, step: int) -> bool:
        # Ranks that hold parts of the parameters might not see the same.
        return self._schedule.is_close(step) and not is_distributed()


_UNFROZEN = (
    "parameters that were frozen move now, at a rate that was found without them. Their first steps are watched. "
    "Add them by optimizer.add_param_group when they are to move, and their own rate is searched"
)
_SET_BY_OTHERS = (
    "the parameters changed between scheduler.step() and the next optimizer.step(): something else set them. No "
    "probe looks at steps from before that; set weights before the first step, or after calibration"
)
