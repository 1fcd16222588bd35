"""AutoLR: the learning-rate scheduler that looks instead of guessing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from . import ops
from .annealing import Annealing, resolve_annealing
from .arguments import (
    check_count,
    check_fraction,
    check_guard,
    check_limits,
    check_optimizer,
    check_windows,
)
from .calibration import LOWEST_AGAIN, Look, search, search_again, steady_state
from .candidates import GradientLine, Line, candidate_parameters
from .distributed import ProcessGroup, is_sharded, local, mean_over_ranks
from .evaluators import Evaluator, resolve_evaluator
from .guard import Guard
from .isolation import Closure, check_repeatable
from .probe import Probe
from .rates import Rates
from .scoring import FACTORS_2, FACTORS_3, Rule, check_factors, resolve_rules, weigh
from .snapshots import Cadence, Snapshots, windows_for

__all__ = ["AutoLR"]


class AutoLR(LRScheduler):
    """Moves the learning rate towards the factors at which the last steps would have lowered the loss more.

    A probe evaluates the loss at N scaled versions of what the optimizer did in its last steps,
    ``prev + f * (now - prev)``, and multiplies the learning rate by the score-weighted geometric mean of the
    factors. It changes nothing but the learning rate (``calibrate`` apart). Probing finds the *level*; annealing
    takes it to zero: ``lr = level * anneal(fraction of training done)``.

    The rule is Algorithm 1 of Kim & Yu, "Automated learning rate scheduling with in-training information";
    :meth:`paper` gives their own setting. The defaults (calibration, two factors, windows that suit the optimizer,
    a probe every ten steps, a guard, annealing) are what keeps that rule from running away under momentum and Adam.

    Args:
        optimizer: any :class:`torch.optim.Optimizer` but LBFGS. Its param groups keep their ratios to each
            other; a group added later keeps its ratio from then on.
        model: the module whose parameters the optimizer trains, wrapped or compiled or not.
        factors: N different positive numbers, some above 1 and some below.
        score: ``"exp"``, or a callable from x [N] to weights [N], not negative.
        normalize: what the score sees: ``"minmax"``, ``"zscore"``, ``"sum"`` (losses over their absolute sum),
            ``"none"``, or a callable from losses [N] to x [N]. A loss that is not finite weighs 0 and is shown
            as the largest finite one.
        every: optimizer steps from probe to probe after calibration; ``None`` for no more probes.
        until: fraction of ``total_steps`` up to which there are probes, calibration apart; from then on the level
            stays, and only annealing goes on. Without ``total_steps`` it plays no part.
        window: optimizer steps that the line of candidates spans: one number, or several that take turns. ``None``
            is 2 for SGD without momentum, 1 and 2 in turn for SGD with it, and 1 and 3 for any other optimizer.
        direction: ``"step"`` for the line through what the optimizer did; ``"gradient"`` for
            ``now - f * lr * grad`` with a fresh gradient of the closure (``window`` then plays no part).
        calibrate: how many of the first optimizer steps are all probed. The first probe searches along its step
            for the scale where the loss is lowest, whatever the score says, and takes that step again at the
            rate found. A later one, if the loss is four times as high as before, takes the last steps again,
            shorter. Parameters change at no other time. 0 for none.
        guard: the level goes above its highest so far only if the mean loss of so many probes (fewer at first) is
            below that of as many before, and below the lowest such mean, by more than two standard errors and a
            thousandth of what the loss has fallen in all; 0 lets it go wherever the factor says.
        total_steps: optimizer steps of the whole training. Without it there is no annealing but ``"plateau"``.
        anneal: ``"cosine"``, ``"linear"``, or a callable from the fraction of training done to a multiplier.
            The logarithm of each factor is scaled by it too, so that the level does not climb against it.
            ``"plateau"``, for trainings without ``total_steps``, takes a fifth off the learning rate, for good, at
            each probe at which the guard sees that the loss does not fall.
        min_lr: lowest learning rate of any param group, annealing included.
        max_lr: highest learning rate of any param group.
        evaluator: ``"auto"`` (the fastest here, see :class:`~autolr_fast.Auto`), ``"streamed"``, ``"folded"``,
            ``"stacked"``, ``"inplace"``, ``"graphed"``, or an :class:`~autolr_fast.Evaluator` such as
            ``Stacked(max_memory=2**30)``. One asked for by name never falls back.
        process_group: the ranks whose losses are averaged before scoring; ``None`` is the default group, where
            ``torch.distributed`` is initialised.

    Attributes:
        last_probe: what the last probe saw, a :class:`~autolr_fast.Probe`, or ``None``.
        last_epoch: optimizer steps done at the last :meth:`step`.

    Raises:
        TypeError: if an argument is of a kind that cannot be meant.
        ValueError: if an argument has a value that cannot be meant, or model and optimizer do not belong
            together.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        >>> scheduler = AutoLR(optimizer, model, total_steps=100)
        >>> x, y = torch.randn(64, 4), torch.ones(64, 1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(x), y).backward()
        ...     optimizer.step()
        ...     scheduler.step(lambda: nn.functional.mse_loss(model(x), y))
        >>> len(scheduler.last_probe.losses), scheduler.level[0] > 1e-2
        (2, True)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        factors: Sequence[float] = FACTORS_2,
        score: str | Rule = "exp",
        normalize: str | Rule = "minmax",
        every: int | None = 10,
        until: float = 0.5,
        window: int | Sequence[int] | None = None,
        direction: str = "step",
        calibrate: int = 20,
        guard: int = 10,
        total_steps: int | None = None,
        anneal: str | Annealing = "cosine",
        min_lr: float = 1e-12,
        max_lr: float = 1e4,
        evaluator: str | Evaluator = "auto",
        process_group: ProcessGroup | None = None,
    ):
        check_optimizer(optimizer)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model={model!r}: expected the nn.Module whose parameters the optimizer trains, "
                "as in AutoLR(optimizer, model)"
            )
        candidate_parameters(model, optimizer)
        if direction not in ("step", "gradient"):
            raise ValueError(f"direction={direction!r} is not known: use 'step' or 'gradient'")
        windows = windows_for(optimizer) if window is None else check_windows(window)
        check_count("calibrate", calibrate, at_least=0)
        if every is not None:
            check_count("every", every, at_least=1)
        if total_steps is not None:
            check_count("total_steps", total_steps, at_least=1)
        check_fraction("until", until, of="total_steps")
        self._settles = anneal == "plateau"
        check_guard(guard, self._settles, total_steps)
        check_limits(min_lr, max_lr)
        if direction == "gradient" and is_sharded(model):
            raise ValueError(
                "direction='gradient' takes a whole gradient, and the model is sharded over ranks: use 'step'"
            )

        self.model = model
        self.factors = check_factors(factors)
        self._unscaled = min(range(len(self.factors)), key=lambda n: abs(math.log(self.factors[n])))
        self.direction = direction
        self.total_steps = total_steps
        self.evaluator = resolve_evaluator(evaluator)
        self.process_group = process_group
        self.last_probe: Probe | None = None
        self._normalize, self._score = normalize, score
        self._rules = resolve_rules(normalize, score, len(self.factors))
        self._maximizes = bool(optimizer.param_groups[0].get("maximize", False))
        self._rates = Rates(optimizer, resolve_annealing(anneal), total_steps, min_lr, max_lr)
        last = math.inf if total_steps is None else until * total_steps
        self._cadence = Cadence(every, calibrate, windows, last)
        self._guard = Guard(guard, self._rates.level.device)
        # A fresh gradient needs no snapshot: steps are only counted.
        counting = Cadence(every=None, calibrate=0, windows=(1,))
        self._snapshots = Snapshots(optimizer, self._cadence if direction == "step" else counting)
        self._searched = calibrate == 0
        self._lowest_loss = math.inf  # of those that calibrating probes saw; negated, of what is maximized
        self._repeatable = False
        self._probed_step = 0
        self._offered_step = 0
        self._warned: set[str] = set()
        super().__init__(optimizer)
        self.base_lrs: list[float] = self._rates.base  # type: ignore[assignment]

    @classmethod
    def paper(cls, optimizer: torch.optim.Optimizer, model: nn.Module, **overrides: Any) -> AutoLR:
        """Return the source's own setting: Factor_3, the last step only, every step, no calibration, no annealing.

        With momentum or Adam it climbs to a learning rate that ruins the network; see the README.

        Args:
            optimizer: as in :class:`AutoLR`.
            model: as in :class:`AutoLR`.
            **overrides: any argument of :class:`AutoLR`.

        Example:
            >>> model = nn.Linear(4, 1)
            >>> AutoLR.paper(torch.optim.SGD(model.parameters(), lr=0.005), model)  # doctest: +NORMALIZE_WHITESPACE
            AutoLR(lr=[0.005], factors=(2.0, 1.0, 0.5), every=1, window=1, direction='step', calibrate=0, guard=0,
            total_steps=None, evaluator='auto')
        """
        setting: dict[str, Any] = {
            "factors": FACTORS_3,
            "every": 1,
            "until": 1.0,
            "window": 1,
            "calibrate": 0,
            "guard": 0,
        }
        return cls(optimizer, model, **{**setting, **overrides})

    def step(self, closure: Closure | None = None) -> None:  # type: ignore[override]
        """Do what is due after an optimizer step: probe, anneal, or nothing.

        Call it after every ``optimizer.step()``. Calls with no optimizer step in between are one.

        Args:
            closure: returns the scalar loss of one batch and does not call backward. It runs only when a probe
                is due: N times or less, each time with the same random numbers; more often at the first probe, to
                see that it repeats itself, and to choose and check an evaluator. With ``maximize=True`` a higher
                value is better. Without a closure no probe is made.

        Raises:
            TypeError: if ``closure`` is not callable.
            ClosureError: if it does not return a scalar loss tensor, or calls backward.
            ValueError: if model and optimizer no longer hold the same parameters.
        """
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure={closure!r}: step takes a callable that returns the loss, "
                "as in scheduler.step(lambda: loss_fn(model(x), y))"
            )
        now = self._snapshots.steps
        due = self._cadence.window_at(now) if self._probed_step != now else None
        if now == self.last_epoch and (closure is None or due is None):
            return
        self._rates.adopt_new_groups(max(self.last_epoch, 0))
        self._warn_of_missed_probes(now)
        if closure is not None and due is not None:
            self._offered_step = now
            self._probe(closure, due, now)
        self.last_epoch = now
        self._step_count = now + 1
        self._apply()

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group; the same as :meth:`get_last_lr`."""
        return self._rates.current()

    @property
    def level(self) -> list[float]:
        """The learning rate of each param group before annealing."""
        return [base * self._rates.level.item() for base in self._rates.base]

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain values, and the snapshot of a window that is open; never the candidates.

        It loads with ``torch.load(weights_only=True)``. A run resumed from it (and from model, optimizer and
        random-number state) is bit for bit the one that was not interrupted.
        """
        self._rates.adopt_new_groups(self.last_epoch)
        return {
            "last_epoch": self.last_epoch,
            "optimizer_steps": self._snapshots.steps,
            "probed_step": self._probed_step,
            "offered_step": self._offered_step,
            "searched": self._searched,
            "lowest_loss": self._lowest_loss,
            "warm": self._snapshots.warm,
            "base_lrs": list(self._rates.base),
            "level": self._rates.level.item(),
            "settled": self._rates.settled.item(),
            "guard": self._guard.state(),
            "evaluator": self.evaluator.state(),
            "snapshots": self._snapshots.state(self._parameters()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, and set the learning rates to it.

        Args:
            state_dict: of a scheduler with the same arguments and as many param groups.

        Raises:
            TypeError: if it is not a dict.
            ValueError: if it is not of such a scheduler; nothing is loaded then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict={state_dict!r}: pass what AutoLR.state_dict() returned")
        expected = set(self.state_dict())
        if set(state_dict) != expected:
            raise ValueError(
                f"state_dict has the keys {sorted(state_dict)}, not {sorted(expected)}: "
                "pass what AutoLR.state_dict() returned"
            )
        groups = len(self.optimizer.param_groups)
        if len(state_dict["base_lrs"]) != groups:
            raise ValueError(
                f"state_dict is of {len(state_dict['base_lrs'])} param groups and the optimizer has {groups}: "
                "give the optimizer the same groups before loading"
            )
        if set(state_dict["evaluator"]) != set(self.evaluator.state()):
            raise ValueError(
                f"state_dict is of an evaluator with the state {state_dict['evaluator']}, and "
                f"{self.evaluator.name!r} has {self.evaluator.state()}: give AutoLR the same evaluator"
            )
        self._guard.check(state_dict["guard"])
        steps, taken = state_dict["optimizer_steps"], state_dict["snapshots"]
        self._snapshots.load(steps, taken, self._parameters())
        self._snapshots.warm = state_dict["warm"]
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._probed_step, self._offered_step = state_dict["probed_step"], state_dict["offered_step"]
        self._searched, self._lowest_loss = state_dict["searched"], state_dict["lowest_loss"]
        self._rates.base[:] = state_dict["base_lrs"]
        self._rates.set_level(state_dict["level"])
        self._rates.settled.fill_(state_dict["settled"])
        self._guard.load(state_dict["guard"])
        self.evaluator.load(state_dict["evaluator"])
        self._apply()

    def __reduce__(self) -> Any:
        """Refuse to be copied or pickled: a copy would not hear of the optimizer's steps."""
        raise TypeError(
            "an AutoLR is bound to its optimizer and cannot be copied or pickled: save scheduler.state_dict(), and "
            "load it into AutoLR(optimizer, model, ...) with the same arguments"
        )

    def __repr__(self) -> str:
        lrs = ", ".join(f"{float(lr):.4g}" for lr in self.get_last_lr())
        windows = self._cadence.windows
        return (
            f"AutoLR(lr=[{lrs}], factors={self.factors}, every={self._cadence.every}, "
            f"window={windows[0] if len(windows) == 1 else windows}, direction={self.direction!r}, "
            f"calibrate={self._cadence.calibrate}, guard={self._guard.count}, total_steps={self.total_steps}, "
            f"evaluator={self.evaluator!r})"
        )

    def _probe(self, closure: Closure, window: int, now: int) -> None:
        parameters = candidate_parameters(self.model, self.optimizer)
        line: Line | None
        if self.direction == "gradient":
            with self._snapshots.refusing_steps():
                line = GradientLine(self.model, self.optimizer, closure, self.process_group)
        else:
            names = {parameter: name for name, parameter in parameters.items()}
            line = self._snapshots.line(self.optimizer, window, names)
        if line is None:
            return
        lr_before = self._rates.current()
        if self._searched or now > self._cadence.calibrate:
            rounds, seen, weights, factor = self._move(line, closure, now)
        else:
            rounds, seen, factor = self._search(line, closure)
            weights, _ = self._follow(seen.losses, self._rates.level.clone())  # the level is where the search ended
        self._probed_step = now
        self._snapshots.drop_used()
        self._rates.apply(now)
        self.last_probe = Probe(
            step=now,
            window=line.window,
            factors=tuple(seen.factors),
            losses=seen.losses,
            weights=weights,
            factor=factor,
            lr_before=lr_before,
            lr_after=self._rates.current(),
            evaluator=self.evaluator.name,
            rounds=rounds,
        )

    def _move(self, line: Line, closure: Closure, now: int) -> tuple[int, Look, Tensor, Tensor]:
        """Move the level by a look at the factors; return the rounds, the look, its weights and the factor."""
        seen = self._look(line, self.factors, closure)
        loss = self._cost(seen.losses[self._unscaled])
        again = None
        if now <= self._cadence.calibrate and line.window:
            again = search_again(
                lambda factors: self._look(line, factors, closure),
                self.factors,
                loss.item(),
                self._lowest_loss,
                maximize=self._maximizes,
            )
            self._lowest_loss = min(self._lowest_loss, loss.item() if again is None else again.lowest)
        # From here on nothing raises that a closure can cause.
        level = self._rates.level
        before = level.clone()
        weights, factor = self._follow(seen.losses, level, self._rates.multiplier(now))
        falls = self._guard.hold(loss if again is None else torch.full_like(loss, again.lowest), level)
        if again is not None:
            self._take_again(line, again.ratio)
            self._rates.set_level(torch.minimum(level, before * max(again.ratio, LOWEST_AGAIN)))
            return 1 + again.rounds, seen, weights, torch.full_like(level, again.ratio)
        if self._settles:
            self._rates.settle(before, falls)
        return 1, seen, weights, factor

    def _cost(self, loss: Tensor) -> Tensor:
        """Return what is to be low: the loss, or what is maximized, negated."""
        return -loss if self._maximizes else loss

    def _look(self, line: Line, factors: Sequence[float], closure: Closure) -> Look:
        """Evaluate candidates."""
        with self._snapshots.refusing_steps():
            if not self._repeatable:
                check_repeatable(self.model, closure)
                self._repeatable = True
            losses = self.evaluator.losses(self.model, line, factors, closure)
        precision = torch.finfo(losses.dtype).eps
        losses = mean_over_ranks(losses.double(), self.process_group).to(self._rates.level.device)
        return Look(factors, losses, precision)

    def _follow(self, losses: Tensor, level: Tensor, exponent: float = 1.0) -> tuple[Tensor, Tensor]:
        """Move the level by what the losses at the factors say; return their weights [N] and factor, 0-dim."""
        wanted = self._cost(losses)
        lowest, highest = self._rates.limits
        if isinstance(self._normalize, str) and isinstance(self._score, str):
            rule = self._normalize  # there is one score with a name, and the operator computes it
            return ops.score(
                wanted, self.factors, level, normalize=rule, exponent=exponent, lowest=lowest, highest=highest
            )
        weights, factor = weigh(wanted, self.factors, *self._rules)
        level.mul_(factor**exponent).clamp_(lowest, highest)
        return weights, factor

    def _search(self, line: Line, closure: Closure) -> tuple[int, Look, Tensor]:
        """Find the first level; return the rounds that took, the last look, and the factor to what was taken."""
        taken = float(self._rates.annealed(max(self.last_epoch, 0)))
        lowest, highest = (limit / taken for limit in self._rates.limits)
        ratio, seen, rounds, unseen, loss = search(
            lambda ratios: self._look(line, ratios, closure),
            self.factors,
            lowest,
            highest,
            maximize=self._maximizes,
        )
        if unseen or loss == math.inf:
            cause = (
                "the loss is the same at every scale of the step. If the closure returns one that was computed "
                "before, let it compute it anew, as in scheduler.step(lambda: loss_fn(model(x), y)); else the step "
                "changed too little for the precision of the loss: start from a higher learning rate"
                if unseen
                else "the loss was not finite at any scale of the step. Check the first batch and the loss"
            )
            self._warn_once(
                f"AutoLR could not calibrate: {cause}. Parameters and learning rate stay as they are; the next of "
                f"the first {self._cadence.calibrate} steps tries again.",
                depth=4,
            )
            return rounds, seen, torch.ones_like(self._rates.level)
        if line.window:
            self._take_again(line, ratio)
        self._rates.set_level(taken * ratio * steady_state(self.optimizer, self._snapshots.warm))
        self._searched = True
        self._lowest_loss = loss
        return rounds, seen, torch.full_like(self._rates.level, ratio)

    def _take_again(self, line: Line, ratio: float) -> None:
        """Put the parameters where a line's steps, at ``ratio`` times their learning rates, would have ended."""
        if ratio != 1.0:
            self._snapshots.retake(ratio, line.window)
            for index, live in enumerate(map(local, line.parameters)):  # one by one: no copy of all is made
                line.write_one(ratio, live.clone(), live, index)

    def _apply(self) -> None:
        self._rates.apply(self.last_epoch)
        self._last_lr = self._rates.current()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _warn_of_missed_probes(self, now: int) -> None:
        steps = range(max(self.last_epoch, 0), now)
        if any(self._cadence.window_at(step) and step > self._offered_step for step in steps):
            self._warn_once(
                "a probe was due, but scheduler.step was called without a closure, or not after every "
                "optimizer.step(): the learning rate was not searched. Call "
                "scheduler.step(lambda: loss_fn(model(x), y)) after every optimizer.step()."
            )
        if self.total_steps is not None and now > self.total_steps:
            self._warn_once(
                f"training goes on past total_steps={self.total_steps}, where annealing has ended and the learning "
                "rate is at its lowest: pass the number of optimizer steps of the whole training"
            )

    def _warn_once(self, message: str, depth: int = 3) -> None:
        """Warn where :meth:`step` was called, as many calls up as ``depth``."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=1 + depth)
