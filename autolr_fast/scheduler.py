"""AutoLR: the learning-rate scheduler that looks instead of guessing."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ._arguments import check_fraction, check_scalar
from ._calibration import Calibration
from ._evaluators import Evaluator, Prober, resolve_evaluator
from ._isolation import Closure, ClosureError, check_loss
from ._level import Level
from ._level.annealing import Annealing
from ._machine.ranks import ProcessGroup, check_process_group, check_shards, is_distributed, mean_over_ranks
from ._machine.warning import WarnOnce
from ._optimizers import Optimizers
from ._probing import Batch, Probing, take_part
from ._state import HEADER, complete
from ._steps import (
    Losses,
    ProbeSchedule,
    ProbeTracker,
    Snapshots,
    StepCounter,
    StepHooks,
    candidate_parameters,
    check_not_sharded,
    memory_for,
)
from .probe import History, Probe
from .rule import FACTORS_3, Rule

__all__ = ["AutoLR"]

_CALIBRATED = 20  # steps
_AT_ONCE = 2  # candidates of a look in a search, where no rule says
_AVERAGED = 10  # steps between two points whose mean shows the heat; fewer where probes are closer
_LATE = 2  # steps of the optimizer without one of the scheduler, beyond which a warning tells
_READS_SINCE = 2  # version of a state: before, the level followed another rule

_log = logging.getLogger("autolr_fast")


class AutoLR(LRScheduler):
    """Finds the learning rate, and keeps it where the noise of its steps costs a small share of what they gain.

    Compute the training loss through `loss`, and call `step` after every ``optimizer.step()``. Give
    ``total_steps``, and leave the other arguments alone.

    1. Calibration searches the first step for the scale where the loss is lowest, and takes that step again there.
       The *level* begins at a third of that rate, or at ``1 - momentum`` of it.
    2. Every later probe asks whether the last ten steps had better been a third shorter, on a batch that these have
       not seen. The *heat* is by how much the loss would have been lower. The *gain* is the fall of the mean loss
       in a doubling of the steps. The level rises while the heat is below ``max_heat`` times the gain.
    3. A probe is due every ten steps. It is made if the level still moves one way. Seven of eight are left out
       while the level stands still, or moves to and fro.
    4. Steps that blow up the loss are taken again, shorter, at a lower level.
    5. Annealing takes the level to zero: ``lr = level * anneal(fraction of training done)``.

    A probe evaluates the loss at scaled versions of the optimizer's last steps, ``prev + f * (now - prev)``. A
    probe changes nothing but the learning rate, calibration and lost steps apart. Looking along steps is Algorithm
    1 of Kim & Yu, "Automated learning rate scheduling with in-training information". `paper` gives their own
    setting, and ``rule`` parts of it.

    Args:
        optimizer: any `torch.optim.Optimizer` whose ``lr`` scales its steps (not LBFGS, Rprop, ASGD), or a list of
            those that train parts of the model, as ``[muon, adamw]``. All param groups keep their ratios to each
            other, and a group whose lr is 0 stays there. The first step of a group that is added later is searched
            as the first step of all was. Such a group keeps the ratio it came with if there is no calibration.
        model: the module whose parameters the optimizer trains, wrapped or compiled or not. The model may hold
            more: all of it is put back after a probe, as are the other modules that a closure can reach.
        total_steps: optimizer steps of the whole training. Nothing anneals without it until `watch` begins to.
        anneal: ``"cosine"``, ``"linear"``, or a callable from the fraction of training done to a multiplier. The
            multiplier scales the logarithm of each move too: the level does not climb against annealing.
        probe_every_steps: optimizer steps from one probe that is due to the next, after calibration; ``None`` for
            no more probes. None is left out with a ``rule``, where `step` is given the closure, or where the
            learning rate is a tensor on an accelerator.
        probe_until_fraction: of ``total_steps``, up to which there are probes, calibration apart. The level stays
            from then on, and only annealing goes on. The fraction plays no part without ``total_steps``.
        calibration_steps: how many of the first optimizer steps are watched; 0 for none. The probe of the first
            searches that step. Later ones are rarer and rarer while losses stay below the first. The last steps are
            taken again, shorter, if a loss is four times as high as before. The level rises only after these
            steps. ``None`` is 20, or 0 for an optimizer that has trained before.
        max_heat: heat in units of the gain at which the level stays; ``math.inf`` for no limit. The parameters of
            an earlier step are kept between probes with a limit.
        rule: that of the source. A probe looks at the rule's candidates along the last steps too. The level moves
            by their factor as far as the heat lets it. ``None`` for the heat alone.
        lr_limits: lowest and highest learning rate, annealing included. Each param group is held by them alone.
        micro_batches: ``"last"`` has a probe run the closure of the last of several calls of `loss` before an
            optimizer step. ``"all"`` has it run all of them, and takes their mean.
        evaluator: ``"auto"`` (see `Auto`), ``"streamed"``, ``"stacked"``, ``"inplace"``, ``"graphed"``, or one such
            as ``Stacked(max_memory=2**30)``. One asked for by name never falls back.
        snapshots: where the parameters from before a step are kept for its probe. ``"device"`` is a copy or two of
            the model on the GPU. ``"host"`` is pinned memory, to which they are copied as the step begins. A probe
            brings them back for each candidate, a parameter or 16 MiB at a time.
        process_group: the ranks whose losses are averaged before scoring; ``None`` is the default group, if any.

    Attributes:
        optimizers: all of them, unwrapped; ``optimizer`` is the first.

    Raises:
        TypeError: if an argument is of a kind that cannot be meant.
        ValueError: if a value cannot be meant, or model and optimizer do not belong together.

    Examples:
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

    # Accelerate's prepare() then gives back AutoLR itself: the wrapper has no loss(), and repeats step().
    _is_accelerate_prepared = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module,
        *,
        total_steps: int | None = None,
        anneal: str | Annealing = "cosine",
        probe_every_steps: int | None = 10,
        probe_until_fraction: float = 0.5,
        calibration_steps: int | None = None,
        max_heat: float = 0.3,
        rule: Rule | None = None,
        lr_limits: tuple[float, float] = (1e-12, 1e4),
        micro_batches: str = "last",
        evaluator: str | Evaluator = "auto",
        snapshots: str = "device",
        process_group: ProcessGroup | None = None,
    ):
        optimizers = Optimizers(optimizer)
        if isinstance(model, nn.Module):
            check_shards(model, optimizers.parameters)
        candidate_parameters(model, optimizers)
        memory = memory_for(snapshots, optimizers.parameters)
        check_process_group(process_group)
        check_fraction("probe_until_fraction", probe_until_fraction, of="total_steps")
        if not (rule is None or isinstance(rule, Rule)):
            raise TypeError(f"rule={rule!r}: expected None, or a Rule such as Rule(factors={FACTORS_3})")
        if rule is None and max_heat == math.inf:
            raise ValueError("max_heat=inf leaves nothing to move the level by: give a rule, or a finite max_heat")
        self._rule = rule
        follows_steps = rule is None or rule.direction == "step"
        if not follows_steps:
            check_not_sharded(model)

        self._history = History()
        self.optimizers = list(optimizers)
        self._follows_steps = follows_steps
        self._optimizers = optimizers
        self._warn_once = warn_once = WarnOnce()
        first_words = [optimizers.another_scheduler()]
        self._level = level = Level(optimizers, anneal, total_steps, lr_limits, max_heat)
        warn_once(optimizers.unread_scales())
        self._first_words = first_words  # told at the first step, unless a state is loaded
        self._is_default = calibration_steps is None
        steps = _CALIBRATED if calibration_steps is None else calibration_steps
        if self._is_default and optimizers.have_trained():
            steps = 0
            first_words.append(_GOES_ON.format(", ".join(f"{level:.4g}" for level in self.level)))
        self._last_probed = math.inf if total_steps is None else probe_until_fraction * total_steps
        windows = rule.window_steps if rule else 1
        schedule = ProbeSchedule(
            probe_every_steps, steps, (windows,) if isinstance(windows, int) else windows, self._last_probed
        )
        if level.heat.is_limited and schedule.every_steps:
            schedule.mean_steps = 1 + min(_AVERAGED, schedule.every_steps)
        self._tracker = ProbeTracker(schedule)
        self._snapshots = Snapshots(optimizers, schedule if follows_steps else None, memory)
        self._losses = Losses(model, micro_batches)
        self._calibration = calibration = Calibration(schedule.first_steps, len(rule.factors) if rule else _AT_ONCE)

        def searches_groups() -> bool:
            return calibration.has_found and follows_steps and take_part(level.new_groups())

        self._hooks = hooks = StepHooks(optimizers, schedule, self._snapshots, searches_groups, warn_once)
        self._counter = StepCounter(
            optimizers, warn_once, hooks.before_step, lambda: warn_once(level.reclaim()), hooks.after_step
        )
        self._maximizes = maximize = bool(optimizers.param_groups[0].get("maximize", False))
        self._prober = prober = Prober(
            model, resolve_evaluator(evaluator), process_group, maximize, device=level.value.device
        )
        self._probing = Probing(
            optimizers=optimizers,
            level=level,
            tracker=self._tracker,
            snapshots=self._snapshots,
            losses=self._losses,
            calibration=calibration,
            prober=prober,
            rule=rule,
            warn_once=warn_once,
        )
        super().__init__(self.optimizers[0])
        self.base_lrs: list[float] = self._level.base  # type: ignore[assignment]

    @classmethod
    def paper(
        cls, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], model: nn.Module, **overrides: Any
    ) -> AutoLR:
        """Return the source's own setting: Factor_3, the last step only, every step, no calibration, no annealing.

        The rate climbs with momentum or Adam until it ruins the network. Take the defaults of `AutoLR` to train.

        Args:
            optimizer: as in `AutoLR`.
            model: as in `AutoLR`.
            **overrides: any argument of `AutoLR`, as ``rule=Rule(FACTORS_3, direction="gradient")``.

        Examples:
            >>> model = nn.Linear(4, 1)
            >>> AutoLR.paper(torch.optim.SGD(model.parameters(), lr=0.005), model)  # doctest: +NORMALIZE_WHITESPACE
            AutoLR(lr=[0.005], total_steps=None, probe_every_steps=1, calibration_steps=0, max_heat=inf,
            rule=Rule(factors=(2.0, 1.0, 0.5), score='exp', normalize='minmax', direction='step', window_steps=1),
            evaluator='auto')
        """
        setting: dict[str, Any] = {
            "rule": Rule(FACTORS_3),
            "probe_every_steps": 1,
            "probe_until_fraction": 1.0,
            "calibration_steps": 0,
            "max_heat": math.inf,
        }
        return cls(optimizer, model, **{**setting, **overrides})

    def loss(self, closure: Closure) -> Tensor:
        """Run the closure with gradients on, and return its loss; keep the closure if the step will be probed.

        A probe runs the closure again for each candidate. The random numbers, the variables, the autocast state and
        the train or eval modes are those of this call. All candidates see the step's own batch and noise. Nothing
        is kept of a step that will not be probed. The gain comes from the losses of all steps.

        Args:
            closure: returns the whole scalar loss of one batch, which ``backward`` is called on afterwards. The
                closure does not log, since a probe runs it again.

        Raises:
            TypeError: if ``closure`` is not callable.
            ClosureError: if ``closure`` does not return a scalar loss tensor, changes a tensor that it holds, or
                gradients are off.
            RuntimeError: if another AutoLR was given the optimizer since.

        Examples:
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

        Call ``remember`` where a framework computes the same loss right afterwards. The gain then comes from the
        losses of probes.

        Args:
            closure: as of `loss`.

        Raises:
            TypeError: if ``closure`` is not callable.
        """
        if not callable(closure):
            raise TypeError(f"closure={closure!r}: {_EXPECTED}")
        self._counter.check_in_use()
        step = self._counter.steps + 1
        if step - max(self.last_epoch, 0) > _LATE:
            self._warn_once(_NOT_STEPPED)
        is_due = self._tracker.schedule.window_at(step) is not None
        if not (is_due or _may_move(self._level.new_groups()) or self._hooks.may_be_first()):
            return
        again = self._losses.begin_anew(step, self._optimizers.parameters)
        if again and self._losses.came_twice():  # else it is a batch to be skipped
            self._warn_once(_TWICE)
        self._losses.remember(closure, step, is_first=again)

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """Do the work that is due after an optimizer step: probe, anneal, or nothing.

        Call ``step`` after every ``optimizer.step()``. Calls with no optimizer step in between are one.

        Args:
            closure: returns the scalar loss that the candidates are judged by instead of that given to `loss`: of
                another batch, say, or of several. The closure does not call backward. A probe runs the closure up
                to N times, each time with the same random numbers. The first probe runs the closure more often, to
                check it and to choose an evaluator. A higher value is better with ``maximize=True``.

        Raises:
            TypeError: if ``closure`` is not callable.
            ClosureError: if a closure, given here or to `loss`, does not return the same scalar loss each time.
                Also if it calls backward or the optimizer, or changes a tensor that it holds; or if no closure has
                come when calibration ends.
            EvaluatorError: if the evaluator asked for cannot serve the model.
            ValueError: if model and optimizer no longer hold the same parameters.
            RuntimeError: if the parameters move, and no step of the optimizer is seen, or if another AutoLR was
                given the optimizer since.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure={closure!r}: {_EXPECTED}; step takes no epoch")
        if self.last_epoch >= 0:  # else it is LRScheduler's own first call, which ends no iteration
            self._counter.end_iteration()
            self._warn_once(self._level.reclaim())
        now = self._counter.steps
        if closure is None and self._is_between_probes(now):  # as nearly always, and in the time of a short step
            self._end_step(now)
            return
        replay, own = self._losses.take(now, self._optimizers.parameters)
        closure, own = (closure, None) if closure is not None else (replay, own)
        window = self._tracker.window_due(now)
        lr_before = self._level.rates() if window is not None else []
        self._join_groups(now)
        if now == self.last_epoch and (closure is None or window is None):
            return
        self._warn_once(self._tracker.missed(range(max(self.last_epoch, 0), now)))
        self._warn_once(self._level.overrun(now))
        while self._first_words and now:
            self._warn_once(self._first_words.pop())
        self._hooks.before_probe(now)
        probe: Probe | None = None
        if closure is not None and window is not None:
            self._tracker.offered = now
            with self._counter.refusing_steps():
                batch = Batch(closure, self._losses.seen(own), own is not None)
                probe = self._probing.probe(batch, window, now, lr_before)
        if probe is not None:
            self._history.add(probe)
        self._hooks.leave(now, probe is not None and probe.retaken is not None)
        self._end_step(now)

    def _is_between_probes(self, now: int) -> bool:
        """Whether there is nothing to do after a step but to anneal: no probe is due, and none was missed."""
        window_at = self._tracker.schedule.window_at
        return (
            now == self.last_epoch + 1
            and not self._first_words
            and window_at(now) is None
            and window_at(now - 1) is None
            and self._losses.is_empty
            and not self._level.new_groups()
            and not self._level.overrun(now)
        )

    def _end_step(self, now: int) -> None:
        """Set the learning rates for the step after so many."""
        self.last_epoch = now
        self._step_count = now + 1
        self._apply()

    def watch(self, loss: float | Tensor) -> None:
        """See the loss on examples held back: annealing begins once that loss has stopped falling.

        Call ``watch`` after `step`, as often as you evaluate: every hundredth of the training, say. It serves
        examples with wrong labels, trainings that are too long, and trainings of no known length.

        The loss has stopped falling if a fifth of the steps brought no new low, and the training loss is clearly
        below the lowest. It has also stopped if two thirds of the steps brought none. The learning rate then falls
        in a straight line to zero, in half as many steps as were trained. ``anneal`` decides where that is lower.
        Probes end. A log line of ``"autolr_fast"`` says so.

        Args:
            loss: the mean of the training's loss function over the same examples each time, in eval mode and
                without gradients. The higher the better with ``maximize=True``. A tensor is read back from its
                device, which waits for it. The loss is averaged over the ranks, so each calls ``watch``. A loss
                that is not finite says nothing. The first of several without a step in between counts.

        Raises:
            TypeError: if ``loss`` is no number and no tensor of real numbers.
            ValueError: if ``loss`` has more than one element.
            RuntimeError: if no optimizer step was made yet.

        Examples:
            >>> model = nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> scheduler = AutoLR(optimizer, model)
            >>> x, y, held_x, held_y = torch.randn(8, 4), torch.ones(8, 1), torch.randn(8, 4), torch.ones(8, 1)
            >>> while not scheduler.has_ended:
            ...     optimizer.zero_grad()
            ...     loss = scheduler.loss(lambda: nn.functional.mse_loss(model(x), y))
            ...     loss.backward()
            ...     optimizer.step()
            ...     scheduler.step()
            ...     with torch.no_grad():
            ...         scheduler.watch(nn.functional.mse_loss(model(held_x), held_y))
        """
        value = check_scalar("loss", loss)
        now = self.last_epoch
        if now < 1:
            raise RuntimeError(
                f"scheduler.watch(loss={value:.6g}) came before the first step: call it after optimizer.step() and "
                "scheduler.step()"
            )
        if is_distributed():
            own = torch.tensor(value, dtype=torch.float64, device=next(iter(self._optimizers.parameters)).device)
            value = mean_over_ranks(own, self._prober.process_group).item()
        held_back, training = self._level.held_back, self._level.heat.recent_loss.item()
        if self.has_ended or not held_back.add(now, -value if self._maximizes else value, training):
            return
        self._end_probes()
        _log.info(
            "the loss on examples held back has stopped falling (%s): the learning rate is annealed from step %d "
            "to its end at step %d",
            held_back,
            now,
            held_back.end,
        )

    @property
    def has_ended(self) -> bool:
        """Whether the learning rate is annealed to its end, by ``total_steps`` or :meth:`watch`."""
        return self._level.has_ended(self.last_epoch)

    def _end_probes(self) -> None:
        """Have no more probes once :meth:`watch` has begun to anneal, but of windows that are open."""
        began, schedule = self._level.held_back.began, self._tracker.schedule
        ends = math.inf if began is None else began + max(*schedule.windows, schedule.mean_steps)
        schedule.last_step = min(self._last_probed, ends)

    def _join_groups(self, now: int) -> None:
        """Give groups that were added the ratio to the others that they came with, if no search is to find it."""
        new = self._level.new_groups()
        waits = self._calibration.has_found and self._follows_steps
        if not new or (waits and any(float(group["lr"]) for group in new)):
            return
        self._level.add_groups(None if self._calibration.is_searching(now) else 1.0)
        self._level.apply(max(self.last_epoch, 0))
        self._last_lr = self._level.rates()

    def _update_lr(self, epoch: int | None = None) -> None:
        """Refuse what SequentialLR calls when a scheduler's turn comes."""
        raise TypeError(
            "SequentialLR cannot hold an AutoLR, which needs no warm-up and anneals by itself: use it alone"
        )

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group; the same as ``get_last_lr``."""
        return self._level.rates()

    @property
    def level(self) -> list[float]:
        """The learning rate of each param group before annealing."""
        return [float(level) for level in self._level.of_groups()]

    @property
    def last_probe(self) -> Probe | None:
        """The last `Probe`; ``None`` before the first."""
        return self._history[-1] if self._history else None

    @property
    def history(self) -> Sequence[Probe]:
        """The probes of the run, the first one first: at most 2,000, evenly over a longer run.

        Those that took steps again are all there.
        """
        return self._history

    @property
    def evaluator(self) -> Evaluator:
        """The evaluator of the candidates; its ``name`` is that of the one that runs."""
        return self._prober.evaluator

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain values, and the snapshot of a window that is open.

        The state loads with ``torch.load(weights_only=True)``. A run resumed with the states of model, optimizer
        and random numbers is bit for bit the one that was not interrupted.
        """
        return {
            **HEADER,
            "last_epoch": self.last_epoch,
            "tracker": self._tracker.state(),
            "pace": self._probing.pace.state(),
            "snapshots": {"steps": self._counter.steps, **self._snapshots.state()},
            "hooks": self._hooks.state(),
            "state_weights": self._snapshots.weights_state(),
            "losses": self._losses.state(),
            "calibration": self._calibration.state(),
            "calibration_steps": self._calibration.steps,
            "level": self._level.state(),
            "evaluator": self.evaluator.state(),
            "history": self._history.state(),
            "groups": [list(place) for place in self._optimizers.places()],
            "optimizers": self._optimizers.names(),
            "held_back": self._level.held_back.state(),
        }

    def share_losses(self) -> None:
        """Have each rank hold the mean over ranks of the losses since the last probe.

        Call ``share_losses`` on every rank before one saves `state_dict` for all. The state of one rank serves all
        then. The call does nothing on one rank alone.

        Examples:
            >>> model = nn.Linear(4, 1)
            >>> scheduler = AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), model)
            >>> scheduler.share_losses()
            >>> state = scheduler.state_dict()
        """
        if is_distributed():
            device = next(iter(self._optimizers.parameters)).device
            self._losses.share(self._prober.process_group, device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned, and set the learning rates to it.

        Args:
            state_dict: of a scheduler with the same arguments and as many param groups.

        Raises:
            TypeError: if it is not a dict.
            ValueError: if it is not of such a scheduler, or of version 1; nothing is loaded then.
        """
        own = self.state_dict()
        state = complete(state_dict, {**own, "evaluator": {}}, {}, "AutoLR", _READS_SINCE)
        self.evaluator.check(state["evaluator"])
        self._level.check(state["level"])
        self._optimizers.check_names(state["optimizers"])
        history = self._history.read(state["history"])
        self._optimizers.load_places(state["groups"])
        try:
            self._snapshots.check(state["snapshots"])
        except ValueError:
            self._optimizers.load_places(own["groups"])
            raise
        lacking = self._snapshots.load(state["snapshots"], state["state_weights"])
        self._counter.go_on_from(state["snapshots"]["steps"])
        self._hooks.load(state["hooks"])
        self._losses.load(state["losses"])
        self._history[:] = history
        if self._is_default:  # what it is depends on what was trained, and that is loaded too
            self._calibration.steps = self._tracker.schedule.first_steps = state["calibration_steps"]
        self._first_words.clear()
        self._calibration.load(state["calibration"])
        self._level.load(state["level"])
        self._level.held_back.load(state["held_back"])
        self._end_probes()
        self.evaluator.load(state["evaluator"])
        self.last_epoch = state["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._tracker.load(state["tracker"], self.last_epoch)
        self._probing.pace.load(state["pace"])
        self._apply()
        self._warn_once(lacking)  # last: a warning may be an error

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
            f"calibration_steps={self._calibration.steps}, max_heat={self._level.heat.limit}, rule={self._rule!r}, "
            f"evaluator={self.evaluator!r})"
        )

    def _apply(self) -> None:
        self._level.apply(self.last_epoch)
        self._last_lr = self._level.rates()


def _may_move(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether the step to come may move any of these param groups."""
    return any(float(group["lr"]) and any(each.requires_grad for each in group["params"]) for group in groups)


_EXPECTED = "expected a callable that returns the loss, as in scheduler.loss(lambda: loss_fn(model(x), y))"
_TWICE = (
    "scheduler.loss was called twice before a step, and found no gradients the second time. The calls of one step "
    "are its micro-batches, and a probe runs the last one. Return the sum of all terms of a loss from one closure; "
    "evaluate without scheduler.loss; a batch that was skipped is forgotten"
)
_NOT_STEPPED = (
    "the optimizer has stepped several times, and scheduler.step() did not follow: call it after every "
    "optimizer.step(), or no learning rate is found"
)
_GOES_ON = (
    "the optimizer has trained before, so AutoLR starts from its lr ({}) and does not search: give "
    "calibration_steps=20 to search, or 0 to agree. Annealing begins anew: load AutoLR's state to go on instead"
)
_EVALUATE = "call it with gradients on; to evaluate, call loss_fn(model(x), y) itself"
