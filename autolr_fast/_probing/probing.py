"""The kinds of probes: a search, a close look at one of the first steps, the heat of the last ten."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._calibration import Calibration, start_ratio
from .._calibration.search import Found, LookAt
from .._evaluators import Look, Prober
from .._isolation import Closure
from .._level import Level
from .._machine.warning import WarnOnce
from .._optimizers import Optimizers
from .._steps import (
    GradientLine,
    Line,
    Losses,
    Pace,
    ProbeTracker,
    Snapshots,
    StepLine,
    candidate_parameters,
    lengths,
)
from ..probe import Probe
from ..rule import Rule
from .seen import Batch, Seen, mean_of, seen_at, seen_in_search

__all__ = ["Probing", "take_part"]

_AVERAGE = (2 / 3, 1.0)  # of the last ten steps but one: a mean of the two points, and the newer one
_NEWER = 1.0
_STEP = (1.0, 0.0)  # the last step, or several, and where they began
_BEFORE = 0.0
_RISE = 0.1  # of the loss of its own batch: a first step after which it has risen by more was too long
_APART = 10  # times as many steps are done as from one probe to the next, at least
_UNKNOWN = 1.2  # by how much a probe moves the level while too little is known of the heat

_log = logging.getLogger("autolr_fast")


class Probing:
    """Makes the probes that are due: each looks along a line of the last steps, and moves the level.

    Args:
        optimizers: whose steps are looked at.
        level: that is moved.
        tracker: knows which probes are due.
        snapshots: keep where lines begin, and take steps again.
        losses: are forgotten once a probe has seen them.
        calibration: says what a search found, and which steps were too long.
        prober: looks.
        rule: the source's, if there is one.
        warn_once: tells the user.

    Attributes:
        pace: says which of the probes that are due are left out.
    """

    def __init__(
        self,
        *,
        optimizers: Optimizers,
        level: Level,
        tracker: ProbeTracker,
        snapshots: Snapshots,
        losses: Losses,
        calibration: Calibration,
        prober: Prober,
        rule: Rule | None,
        warn_once: WarnOnce,
    ):
        self._optimizers = optimizers
        self._level = level
        self._tracker = tracker
        self._snapshots = snapshots
        self._losses = losses
        self._calibration = calibration
        self._prober = prober
        self._rule = rule
        self._follows_steps = rule is None or rule.direction == "step"
        self._warn_once = warn_once
        self.pace = Pace()

    def probe(self, batch: Batch, window: int, now: int, lr_before: Sequence[float | Tensor]) -> Probe | None:
        """Look along the line of the last steps, and move the level by what the losses say.

        Args:
            batch: that the candidates are judged by.
            window: steps of the line.
            now: optimizer steps done.
            lr_before: the learning rates of the last step.

        Returns:
            What was seen; ``None`` if the probe is left out, or there is nothing to look at.
        """
        self._warn_once(self._snapshots.agree(self._prober.process_group))
        schedule = self._tracker.schedule
        new = self._level.new_groups() if now == schedule.searched_step else []
        new = new if take_part(new) else []
        is_search = bool(new) or self._calibration.is_searching(now)
        is_close = self._follows_steps and schedule.is_close(now)
        if is_close != schedule.is_close(self._tracker.probed):
            self.pace.begin_anew()
        is_left_out, is_alarmed = (False, False) if is_search else self._left_out(batch, is_close, now)
        if is_left_out:
            self._end_probe(now)
            return None
        if self._rule is None and not (is_search or is_close):
            window, seen = schedule.mean_steps - 1, self._follow(None, batch, now)
        else:
            only = {each for group in new for each in group["params"]}
            line = self._line(batch.closure, 2, now, only) if is_alarmed else None
            line = line or self._line(batch.closure, window, now, only)
            if line is None:
                return None
            window = line.window
            if is_search:
                # The loss before the step is not that of where new groups alone have not moved.
                seen = self._search(
                    line, batch._replace(beside=None, knows_begin=False) if new else batch, now, new
                )
            elif is_close:
                seen = self._follow_closely(line, batch, now)
            else:
                seen = self._follow(line, batch, now)
        if seen is None:
            return None
        self._end_probe(now)
        self._level.apply(now)
        probe = Probe(
            step=now,
            window=window,
            **seen._asdict(),
            lr_before=lr_before,
            lr_after=self._level.rates(),
            level_after=self._level.of_groups(),
            evaluator=self._prober.evaluator.name,
        )
        if probe.retaken is not None:
            what = (
                f"took the last steps again, {probe.retaken:g} times as long"
                if probe.retaken
                else "undid the last steps"
            )
            _log.info("%s, and moved the parameters: %r", what, probe)
        return probe

    def _left_out(self, batch: Batch, is_close: bool, now: int) -> tuple[bool, bool]:
        """Return whether a probe that is due is left out, and whether training's losses ask for one.

        They tell if steps were too long: where they do not reach AutoLR by themselves, no probe is left out.
        """
        if batch.beside is None or not (batch.knows_begin and self._level.value.is_cpu):
            return False, False
        if not is_close and self._rule is not None:
            return False, False
        # What the level should be changes with the logarithm of the steps done.
        least = 1 if is_close else _APART * (self._tracker.schedule.every_steps or 1)
        is_left_out = self.pace.leaves_out(now // least)
        if not is_left_out and not (is_close and self.pace.due > 1):
            return False, False
        training = self._prober.training(batch.beside)
        own = training.own.item()
        if self._calibration.may_be_lost(own, training.mean.item(), is_close):
            return False, True
        if is_close and self._calibration.is_above_start(own):  # each of such steps is looked at
            return False, False
        if is_left_out:
            self._see(training.mean, now)
        return is_left_out, False

    def _end_probe(self, now: int) -> None:
        self._losses.forget()
        self._tracker.probed = now
        self._snapshots.drop_used(now)

    def _line(
        self, closure: Closure, window: int, now: int, only: Collection[nn.Parameter]
    ) -> StepLine | GradientLine | None:
        """Return the candidates that are due, of some parameters or all; ``None`` if no window of them is open."""
        names = candidate_parameters(self._prober.model, self._optimizers)
        if not self._follows_steps:
            return GradientLine(self._prober.model, self._optimizers, closure, self._prober.process_group)
        return self._snapshots.line(window, now, names, only)

    def _look(self, batch: Batch, line: Line, factors: Sequence[float], known: float | None = None) -> Look:
        """Return the losses of a batch along a line, but for the factor at which training saw it."""
        known = known if batch.knows_begin else None
        return self._prober.look(line, batch.closure, factors, batch.beside, known)

    def _search(self, line: StepLine | GradientLine, batch: Batch, now: int, new: Sequence[dict[str, Any]]) -> Seen:
        """Start the level, or the rates of new groups, where their first step is best, and take that step again."""
        is_known = batch.knows_begin and line.window == 1  # the loss where the step began
        look: LookAt = partial(self._look, batch, line, known=_BEFORE if is_known else None)
        step, begin = lengths(line.squares(), self._prober.process_group)
        if new:
            highest = self._level.highest_ratio(float(group["lr"]) for group in new)
            found = self._calibration.find_for_groups(look, step, begin, highest, is_known)
            self._level.add_groups(None if found.why_not else found.ratio * start_ratio(new))
        else:
            level = self._level.current()  # at which the step was taken
            highest = self._level.highest_ratio(level * base for base in self._level.base)
            found = self._calibration.find_first(look, step, begin, highest, is_known)
            if not found.why_not:
                go_on = start_ratio(self._optimizers.param_groups, self._snapshots.began_warm)
                self._level.start_at(level * found.ratio * go_on)
        self._warn_once(_why_not(found, self._calibration.steps - now, bool(new)))
        return seen_in_search(found, self._retake(line, found.taken, now))

    def _follow_closely(self, line: StepLine | GradientLine, batch: Batch, now: int) -> Seen:
        """Lower the level if the last of the first steps raised the loss; if it blew up, take steps again."""
        seen = self._look(batch, line, _STEP, known=_BEFORE if line.window == 1 else None)
        cost = seen.costs[0]
        again = self._calibration.find_again(partial(self._look, batch, line), seen, cost, line.window)
        # From here on nothing raises that a closure can cause.
        self._see(mean_of(seen, cost, again), now)
        if again is None:
            moved, before = torch.ones_like(cost), seen.costs[1]
            if cost - before > _RISE * before.abs():
                moved = self._level.follow(torch.full_like(cost, 1 / _UNKNOWN), now)
            self.pace.see(moved.item())
            return seen_at(seen, moved)
        self.pace.hold()  # one such step is seldom the last
        self._level.fall(again.taken, with_ceiling=False)
        # What is no number stays in the states of optimizers, and would undo each step to come.
        retaken = self._retake(line, again.taken, now, begin_anew=not cost.isfinite())
        return seen_at(seen, torch.full_like(cost, again.taken), again, retaken)

    def _follow(self, line: StepLine | GradientLine | None, batch: Batch, now: int) -> Seen | None:
        """Move the level by the heat, and by the rule if there is one; if they lost all, take the steps again.

        Args:
            line: of the rule's candidates, if there is one.
            batch: as of :meth:`probe`.
            now: optimizer steps done.

        Returns:
            ``None`` if there is nothing to look at.
        """
        names = candidate_parameters(self._prober.model, self._optimizers)
        averaged, steps = self._snapshots.lines_back(now, names)
        asked = warm = None
        if self._rule is not None and line is not None:
            asked = self._look(batch, line, self._rule.factors)
        if averaged is not None:
            warm = self._look(batch, averaged, _AVERAGE, known=_NEWER)
        seen = asked or warm
        if seen is None:
            return None
        cost = seen.costs[-1] if self._rule is None else seen.costs[self._rule.unscaled]
        again, mean = None, mean_of(seen, cost)
        if steps is not None and self._level.value.is_cpu:
            look: LookAt = partial(self._look, batch, steps)
            again = self._calibration.find_later(look, cost.item(), mean.item())
        # From here on nothing raises that a closure can cause.
        self._see(mean if again is None else mean_of(seen, cost, again), now)
        weights = None
        if self._rule is None:
            says = seen.costs.isfinite().any() & seen.costs.any()  # where the loss is 0, nothing can be gained
            factor = torch.where(says, torch.full_like(cost, _UNKNOWN), 1.0)
        else:
            weights, factor = self._rule.weigh(seen.costs, None if seen.training is None else seen.training.own)
        if again is not None:
            self.pace.begin_anew()
            self._level.fall(again.taken, with_ceiling=True)
            retaken = self._retake(steps, again.taken, now, begin_anew=True)
            _clear_statistics(self._prober.model)
            return seen_at(seen, torch.full_like(factor, again.taken), again, retaken, weights)
        if warm is not None:
            self._level.heat.add_heat(warm.costs[1] - warm.costs[0])
        moved = self._level.follow(factor, now, max(1, self.pace.due))
        if moved.is_cpu:
            self.pace.see(moved.item())
        return seen_at(seen, moved, weights=weights)

    def _see(self, mean: Tensor, now: int) -> None:
        """Take the mean loss of the steps since the last probe, 0-dim, into account."""
        self._level.heat.add_loss(mean, now)
        if self._level.value.is_cpu:
            self._calibration.see(mean.item())

    def _retake(
        self, line: StepLine | GradientLine | None, ratio: float, now: int, begin_anew: bool = False
    ) -> float | None:
        """Take the steps of a line again; return the ratio if anything moved."""
        if not isinstance(line, StepLine):
            return None
        taken, message = self._snapshots.retake(line, ratio, now, begin_anew)
        self._warn_once(message)
        return taken


def _clear_statistics(model: nn.Module) -> None:
    """Begin the running statistics anew that a blow-up left without numbers: no later batch mends them."""
    for module in model.modules():
        reset = getattr(module, "reset_running_stats", None)
        if reset and not all(buffer.isfinite().all() for buffer in module.buffers(recurse=False)):
            reset()


def take_part(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether a step moves any of these param groups."""
    return any(
        float(group["lr"]) and any(parameter.grad is not None for parameter in group["params"]) for group in groups
    )


def _why_not(found: Found, left_steps: int, is_of_groups: bool) -> str:
    """Return what to tell the user of a search; nothing if it found what it was for."""
    if not found.why_not:
        return ""
    left = "stays" if found.taken else "is undone"
    if is_of_groups:
        return (
            f"AutoLR searched the first step of the param groups that were added, and {found.why_not}. The step "
            f"{left}; their lr keeps the ratio to those that the optimizer began with"
        )
    if found.is_endless:
        after = "probes move the learning rate from where it is"
    else:
        after = "a next step tries again" if left_steps > 0 else "no more steps are searched"
    return f"AutoLR could not calibrate: {found.why_not}. The step {left}, the learning rate stays, and {after}"
