"""AutoLR: the learning-rate scheduler that looks instead of guessing."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ._arguments import check_fraction
from ._calibration import Calibration, start_ratio
from ._calibration.search import LookAt
from ._evaluators import Evaluator, Look, Prober, resolve_evaluator
from ._isolation import Closure, ClosureError, check_loss
from ._level import Level
from ._level.annealing import Annealing
from ._machine.ranks import ProcessGroup
from ._machine.warning import WarnOnce
from ._optimizers import Optimizers
from ._state import HEADER, complete
from ._steps import (
    GradientLine,
    Line,
    Losses,
    ProbeSchedule,
    ProbeTracker,
    Snapshots,
    StepCounter,
    candidate_parameters,
    check_not_sharded,
    windows_for,
)
from .probe import History, Probe
from .rule import FACTORS_3, Rule

__all__ = ["AutoLR"]

_log = logging.getLogger("autolr_fast")


class AutoLR(LRScheduler):
    """Moves the learning rate towards the factors at which the last steps would have lowered the loss more.

    A probe evaluates the loss at N scaled versions of what the optimizer did in its last steps,
    ``prev + f * (now - prev)``, and multiplies the learning rate by the score-weighted geometric mean of the
    factors. A probe changes nothing but the learning rate (calibration apart). Probing finds the *level*; annealing
    takes it to zero: ``lr = level * anneal(fraction of training done)``.

    The rule is Algorithm 1 of Kim & Yu, "Automated learning rate scheduling with in-training information";
    :meth:`paper` gives their own setting. The defaults (calibration, two factors, windows that suit the optimizer,
    a probe every ten steps, a guard, annealing) are what keeps that rule from running away under momentum and Adam.

    Args:
        optimizer: any :class:`torch.optim.Optimizer` but LBFGS, or a list of those that train parts of the model,
            as ``[muon, adamw]``. All param groups keep their ratios to each other; a group added later keeps its
            ratio from then on.
        model: the module whose parameters the optimizer trains, wrapped or compiled or not. It may hold more: all
            of it is put back after a probe, so pass ``nn.ModuleList([model, criterion])`` if the loss has buffers.
        total_steps: optimizer steps of the whole training. Without it there is no annealing but ``"plateau"``.
        anneal: ``"cosine"``, ``"linear"``, or a callable from the fraction of training done to a multiplier.
            The multiplier scales the logarithm of each factor too: the level does not climb against annealing.
            ``"plateau"`` is for trainings without ``total_steps``: each probe at which the guard sees that the loss
            does not fall takes a fifth off the learning rate, for good.
        probe_every_steps: optimizer steps from probe to probe after calibration; ``None`` for no more probes.
        probe_until_fraction: of ``total_steps``, up to which there are probes, calibration apart. From then on the
            level stays, and only annealing goes on. It plays no part without ``total_steps``.
        calibration_steps: how many of the first optimizer steps are all probed; 0 for none. The first probe
            searches its step for the scale where the loss is lowest, and takes that step again at the rate found. A
            later one takes the last steps again, shorter, if the loss is four times as high as before. Parameters
            change at no other time.
        guard_probes: the level exceeds its highest so far only while the mean loss of so many probes (fewer at
            first) reaches clear new lows. The loss of a probe is the mean of all that :meth:`loss` returned since
            the probe before. The level is halved if that mean rises clearly. 0 switches the guard off.
        rule: which candidates are looked at, and how their losses make one factor.
        lr_limits: lowest and highest learning rate of any param group, annealing included.
        micro_batches: ``"last"``: of several calls of :meth:`loss` before an optimizer step, a probe runs the last
            one's closure; ``"all"``: all of them, and takes their mean.
        evaluator: ``"auto"`` (see :class:`~autolr_fast.Auto`), ``"streamed"``, ``"stacked"``, ``"inplace"``,
            ``"graphed"``, or one such as ``Stacked(max_memory=2**30)``. One asked for by name never falls back.
        process_group: the ranks whose losses are averaged before scoring; ``None`` is the default group, if any.

    Attributes:
        optimizers: all of them, unwrapped; ``optimizer`` is the first.

    Raises:
        TypeError: if an argument is of a kind that cannot be meant.
        ValueError: if a value cannot be meant, or model and optimizer do not belong together.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        >>> scheduler = AutoLR(optimizer, model, total_steps=100)
        >>> x, y = torch.randn(64, 4), torch.ones(64, 1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = scheduler.loss(lambda: nn.functional.mse_loss(model(x), y))
        ...     loss.backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> len(scheduler.last_probe.losses), scheduler.level[0] > 1e-2
        (2, True)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module,
        *,
        total_steps: int | None = None,
        anneal: str | Annealing = "cosine",
        probe_every_steps: int | None = 10,
        probe_until_fraction: float = 0.5,
        calibration_steps: int = 20,
        guard_probes: int = 10,
        rule: Rule = Rule(),  # noqa: B008, it is frozen
        lr_limits: tuple[float, float] = (1e-12, 1e4),
        micro_batches: str = "last",
        evaluator: str | Evaluator = "auto",
        process_group: ProcessGroup | None = None,
    ):
        optimizers = Optimizers(optimizer)
        candidate_parameters(model, optimizers)
        check_fraction("probe_until_fraction", probe_until_fraction, of="total_steps")
        if not isinstance(rule, Rule):
            raise TypeError(f"rule={rule!r}: expected a Rule, such as Rule(factors={FACTORS_3})")
        if rule.direction == "gradient":
            check_not_sharded(model)

        self._history = History()
        self.optimizers = list(optimizers)
        self._optimizers = optimizers
        self._rule = rule
        self._level = level = Level(optimizers, anneal, total_steps, lr_limits, guard_probes)
        schedule = ProbeSchedule(
            probe_every_steps,
            calibration_steps,
            windows_for(optimizers, rule.window_steps),
            last_step=math.inf if total_steps is None else probe_until_fraction * total_steps,
        )
        self._tracker = ProbeTracker(schedule)
        self._snapshots = Snapshots(optimizers, schedule if rule.direction == "step" else None)
        self._losses = Losses(model, micro_batches)
        self._warn_once = warn_once = WarnOnce()
        self._counter = StepCounter(
            optimizers, warn_once, self._snapshots.keep, before_each=lambda: warn_once(level.reclaim())
        )
        self._calibration = Calibration(calibration_steps, rule.factors)
        maximize = bool(optimizers.param_groups[0].get("maximize", False))
        self._prober = Prober(
            model, resolve_evaluator(evaluator), process_group, maximize, device=self._level.value.device
        )
        super().__init__(self.optimizers[0])
        self.base_lrs: list[float] = self._level.base  # type: ignore[assignment]

    @classmethod
    def paper(
        cls, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], model: nn.Module, **overrides: Any
    ) -> AutoLR:
        """Return the source's own setting: Factor_3, the last step only, every step, no calibration, no annealing.

        With momentum or Adam it climbs to a learning rate that ruins the network; see the README.

        Args:
            optimizer: as in :class:`AutoLR`.
            model: as in :class:`AutoLR`.
            **overrides: any argument of :class:`AutoLR`, as ``rule=Rule(FACTORS_3, direction="gradient")``.

        Example:
            >>> model = nn.Linear(4, 1)
            >>> AutoLR.paper(torch.optim.SGD(model.parameters(), lr=0.005), model)  # doctest: +NORMALIZE_WHITESPACE
            AutoLR(lr=[0.005], total_steps=None, probe_every_steps=1, windows=(1,), calibration_steps=0,
            factors=(2.0, 1.0, 0.5), direction='step', evaluator='auto')
        """
        setting: dict[str, Any] = {
            "rule": Rule(FACTORS_3, window_steps=1),
            "probe_every_steps": 1,
            "probe_until_fraction": 1.0,
            "calibration_steps": 0,
            "guard_probes": 0,
        }
        return cls(optimizer, model, **{**setting, **overrides})

    def loss(self, closure: Closure) -> Tensor:
        """Run the closure with gradients on, and return its loss; keep the closure if the step will be probed.

        A probe runs the closure again for each candidate, with the random numbers, the variables, the autocast
        state and the train or eval modes that it finds here: all candidates see the step's own batch and noise.
        Nothing is kept of a step that will not be probed. The guard and ``anneal="plateau"`` judge progress by the
        losses of all steps.

        Args:
            closure: returns the whole scalar loss of one batch, which ``backward`` is called on afterwards. A probe
                runs the closure again, so it does not log.

        Raises:
            TypeError: if ``closure`` is not callable.
            ClosureError: if it does not return a scalar loss tensor, or gradients are off.

        Example:
            >>> model = nn.Linear(4, 1)
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> scheduler = AutoLR(optimizer, model, total_steps=100)
            >>> loss = scheduler.loss(lambda: model(torch.randn(8, 4)).square().mean())
            >>> loss.backward()
            >>> optimizer.step()
            >>> scheduler.step()
            >>> scheduler.last_probe.step
            1
        """
        if not torch.is_grad_enabled():
            raise ClosureError("scheduler.loss returns a loss to train by, and gradients are off: " + _EVALUATE)
        self.remember(closure)
        try:
            loss = closure()
            check_loss(loss)
        except BaseException:
            self._losses.forget_last()
            raise
        self._losses.add(loss)
        return loss

    def remember(self, closure: Closure) -> None:
        """Remember a closure for a probe, without running it.

        A framework calls it just before it computes the same loss. The guard then sees one loss a probe only.

        Args:
            closure: as of :meth:`loss`.

        Raises:
            TypeError: if ``closure`` is not callable.
        """
        if not callable(closure):
            raise TypeError(f"closure={closure!r}: {_EXPECTED}")
        step = self._counter.steps + 1
        if self._tracker.schedule.window_at(step) is None:
            return
        again = self._losses.has(step) and all(each.grad is None for each in self._optimizers.parameters)
        if again:
            self._warn_once(_TWICE)
        self._losses.remember(closure, step, is_first=again)

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """Do what is due after an optimizer step: probe, anneal, or nothing.

        Call it after every ``optimizer.step()``. Calls with no optimizer step in between are one.

        Args:
            closure: returns the scalar loss that the candidates are judged by instead of that given to
                :meth:`loss`: of another batch, say, or of several. The closure does not call backward. A probe runs
                the closure up to N times, each time with the same random numbers. The first probe runs the closure
                more often, to check it and to choose an evaluator. With ``maximize=True`` a higher value is better.

        Raises:
            TypeError: if ``closure`` is not callable.
            ClosureError: if it, or that given to :meth:`loss`, does not return the same scalar loss each time,
                calls backward or the optimizer; or if no closure has come when calibration ends.
            EvaluatorError: if the evaluator asked for cannot serve the model.
            ValueError: if model and optimizer no longer hold the same parameters.
            RuntimeError: if the parameters move, and no step of the optimizer is seen.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure={closure!r}: {_EXPECTED}")
        if self.last_epoch >= 0:  # else it is LRScheduler's own first call, which ends no iteration
            self._counter.end_iteration()
            self._warn_once(self._level.reclaim())
        now = self._counter.steps
        replay, own = self._losses.take(now)
        closure, own = (closure, None) if closure is not None else (replay, own)
        window = self._tracker.window_due(now)
        if now == self.last_epoch and (closure is None or window is None):
            return
        self._level.add_new_groups(max(self.last_epoch, 0))
        self._warn_once(self._tracker.missed(range(max(self.last_epoch, 0), now)))
        self._warn_once(self._level.overrun(now))
        if closure is not None and window is not None:
            self._tracker.offered = now
            with self._counter.refusing_steps():
                self._probe(closure, window, now, self._losses.seen(own))
        self.last_epoch = now
        self._step_count = now + 1
        self._apply()

    def _probe(self, closure: Closure, window: int, now: int, beside: Tensor | None) -> None:
        """Look along the line of the last steps, and move the level by what the losses say.

        Args:
            closure: of the candidates.
            window: steps of the line.
            now: optimizer steps done.
            beside: [3], the mean loss since the last probe, its variance, and the closure's before the last step.
        """
        line = self._line(closure, window, now)
        if line is None:
            return
        look: LookAt = partial(self._prober.look, line, closure, beside=beside)
        lr_before = self._level.rates()
        retaken: float | None
        if self._calibration.is_searching(now):
            seen, factor, retaken, rounds = self._search(line, look, now)
            weights, _ = self._rule.weigh(seen.costs)
        else:
            seen, weights, factor, retaken, rounds = self._follow(line, look, now)
        self._losses.forget()
        self._tracker.probed = now
        self._snapshots.drop_used(now)
        self._level.apply(now)
        probe = Probe(
            step=now,
            window=line.window,
            factors=tuple(seen.factors),
            losses=seen.losses,
            weights=weights,
            factor=factor,
            lr_before=lr_before,
            lr_after=self._level.rates(),
            level_after=self._level.of_groups(),
            evaluator=self._prober.evaluator.name,
            rounds=rounds,
            retaken=retaken,
        )
        self._history.add(probe)
        if retaken is not None:
            _log.info("took the last steps again, %g times as long, and moved the parameters: %r", retaken, probe)

    def _line(self, closure: Closure, window: int, now: int) -> Line | None:
        """Return the candidates that are due; ``None`` if where the window began was not kept."""
        names = candidate_parameters(self._prober.model, self._optimizers)
        if self._rule.direction == "gradient":
            return GradientLine(self._prober.model, self._optimizers, closure, self._prober.process_group)
        return self._snapshots.line(window, now, names)

    def _search(self, line: Line, look: LookAt, now: int) -> tuple[Look, Tensor, float | None, int]:
        """Start the level where the first step is best, and take the step again; or say that nothing was found."""
        level = float(self._level.annealed(max(self.last_epoch, 0)))  # at which the step was taken
        lowest, highest = (limit / level for limit in self._level.limits)
        found = self._calibration.find_first(look, lowest, highest, line.window)
        if found.why_not:
            self._warn_once(
                f"AutoLR could not calibrate: {found.why_not}. Parameters and learning rate stay as they are; the "
                f"next of the first {self._calibration.steps} steps tries again."
            )
            return found.seen, torch.ones_like(self._level.value), None, found.rounds
        self._level.start_at(level * found.ratio * start_ratio(self._optimizers, self._snapshots.began_warm))
        retaken = self._retake(line, found.ratio, now)
        return found.seen, torch.full_like(self._level.value, found.ratio), retaken, found.rounds

    def _follow(self, line: Line, look: LookAt, now: int) -> tuple[Look, Tensor, Tensor, float | None, int]:
        """Move the level by the rule's factor; if the loss blew up in the first steps, take the last ones again."""
        seen = look(self._rule.factors)
        weights, factor = self._rule.weigh(seen.costs)
        cost = seen.costs[self._rule.unscaled]
        again = self._calibration.find_again(look, seen, cost, now, line.window) if line.window else None
        # From here on nothing raises that a closure can cause.
        if again is None:
            loss, variance = _progress(seen, cost)
            self._level.follow(factor, loss, now, variance=variance)
            return seen, weights, factor, None, 1
        self._level.follow(factor, torch.full_like(cost, again.cost), now, retaken=again.ratio)
        retaken = self._retake(line, again.ratio, now)
        return seen, weights, torch.full_like(factor, again.ratio), retaken, 1 + again.rounds

    def _retake(self, line: Line, ratio: float, now: int) -> float | None:
        """Take the steps of a line again; return the ratio if anything moved."""
        if not line.window or ratio == 1.0:
            return None
        self._snapshots.retake(line, ratio, now)
        return ratio

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group; the same as :meth:`get_last_lr`."""
        return self._level.rates()

    @property
    def level(self) -> list[float]:
        """The learning rate of each param group before annealing."""
        return [float(level) for level in self._level.of_groups()]

    @property
    def last_probe(self) -> Probe | None:
        """What the last probe saw; ``None`` before the first."""
        return self._history[-1] if self._history else None

    @property
    def history(self) -> Sequence[Probe]:
        """What the probes saw, the first one first: at most 2,000, evenly over a longer run.

        Those that took steps again are all there.
        """
        return self._history

    @property
    def evaluator(self) -> Evaluator:
        """What evaluates the candidates; its ``name`` is the one that runs."""
        return self._prober.evaluator

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain values, and the snapshot of a window that is open.

        It loads with ``torch.load(weights_only=True)``. With the states of model, optimizer and random numbers, a
        resumed run is bit for bit the one that was not interrupted.
        """
        self._level.add_new_groups(self.last_epoch)
        return {
            **HEADER,
            "last_epoch": self.last_epoch,
            "tracker": self._tracker.state(),
            "snapshots": {"steps": self._counter.steps, **self._snapshots.state()},
            "losses": self._losses.state(),
            "calibration": self._calibration.state(),
            "level": self._level.state(),
            "evaluator": self.evaluator.state(),
            "history": self._history.state(),
            "groups": [list(place) for place in self._optimizers.places()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, and set the learning rates to it.

        Args:
            state_dict: of a scheduler with the same arguments and as many param groups.

        Raises:
            TypeError: if it is not a dict.
            ValueError: if it is not of such a scheduler; nothing is loaded then.
        """
        own = self.state_dict()
        defaults = {name: own[name] for name in ("losses", "history", "groups")}
        state = complete(state_dict, {**own, "evaluator": {}}, defaults, "AutoLR")
        self.evaluator.check(state["evaluator"])
        self._level.check(state["level"])
        history = self._history.read(state["history"])
        self._optimizers.load_places(state["groups"])
        try:
            self._snapshots.check(state["snapshots"])
        except ValueError:
            self._optimizers.load_places(own["groups"])
            raise
        self._snapshots.load(state["snapshots"])
        self._counter.steps = state["snapshots"]["steps"]
        self._losses.load(state["losses"])
        self._history[:] = history
        self._calibration.load(state["calibration"])
        self._level.load(state["level"])
        self.evaluator.load(state["evaluator"])
        self.last_epoch = state["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._tracker.load(state["tracker"])
        self._apply()

    def __reduce__(self) -> Any:
        """Refuse to be copied or pickled: a copy would not hear of the optimizer's steps."""
        raise TypeError(
            "an AutoLR is bound to its optimizer and cannot be copied or pickled: save scheduler.state_dict(), and "
            "load it into AutoLR(optimizer, model, ...) with the same arguments"
        )

    def __repr__(self) -> str:
        lrs, schedule = ", ".join(f"{float(lr):.4g}" for lr in self.get_last_lr()), self._tracker.schedule
        return (
            f"AutoLR(lr=[{lrs}], total_steps={self._level.total_steps}, probe_every_steps={schedule.every_steps}, "
            f"windows={tuple(schedule.windows)}, calibration_steps={self._calibration.steps}, "
            f"factors={self._rule.factors}, direction={self._rule.direction!r}, evaluator={self.evaluator!r})"
        )

    def _apply(self) -> None:
        self._level.apply(self.last_epoch)
        self._last_lr = self._level.rates()


def _progress(seen: Look, cost: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the loss that progress is judged by, and its variance: of all steps, or of one candidate."""
    if seen.training is None:
        return cost, None
    mean, variance, _ = seen.training
    return torch.where(mean.isnan(), cost, mean), variance


_EXPECTED = "expected a callable that returns the loss, as in scheduler.loss(lambda: loss_fn(model(x), y))"
_TWICE = (
    "scheduler.loss was called twice before a step, and found no gradients the second time. The calls of one step "
    "are its micro-batches, and a probe runs the last one. Return the sum of all terms of a loss from one closure; "
    "evaluate without scheduler.loss; a batch that was skipped is forgotten"
)
_EVALUATE = "call it with gradients on; to evaluate, call loss_fn(model(x), y) itself"
