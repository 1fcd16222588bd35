"""The steps of the optimizers: counted, and refused while closures run."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._isolation import REMEDY, ClosureError
from .._machine.warning import warn
from .._optimizers import Optimizers, names_of
from .writes import sample

__all__ = ["StepCounter"]

_COUNTERS: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[StepCounter]] = weakref.WeakKeyDictionary()
_ENOUGH = 20  # iterations in which not all optimizers stepped, with none in which they did


class StepCounter:
    """Counts the real steps: one is done when each optimizer has stepped, in any order.

    A step that a GradScaler skips, also inside a fused optimizer, is not counted, and a step that calls that of the
    class it derives from is one. An optimizer has one counter: a
    later one takes its place.

    Args:
        optimizers: their step hooks are used; they go when this object goes.
        tell: warns the user, once of each thing.
        before_step: called with ``steps`` before the first optimizer of a step moves anything.
        before_each: called before each optimizer steps.
        after_step: called with ``steps`` after the last optimizer of a step.

    Attributes:
        steps: optimizer steps counted so far.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        tell: Callable[[str], None] = warn,
        before_step: Callable[[int], None] = lambda steps: None,
        before_each: Callable[[], None] = lambda: None,
        after_step: Callable[[int], None] = lambda steps: None,
    ):
        self.steps = 0
        self._optimizers = optimizers
        self._tell = tell
        self._before_step = before_step
        self._before_each = before_each
        self._after_step = after_step
        self._done: list[torch.optim.Optimizer] = []  # stepped in this iteration
        self._stepping: torch.optim.Optimizer | None = None  # whose step is under way, unless it raised
        self._moves = False  # whether the step that is under way has gradients
        self._inner = 0  # calls of its step inside of that
        self._refusing = False
        self._idle = 0  # iterations since the last step
        self._incomplete = 0  # iterations in which not all stepped
        self._sample: Tensor | None = None  # of the parameters, as the first iteration ended without a step
        self._gradients: list[tuple[weakref.ref[Tensor], int]] = []  # as it ended, and their versions
        # An optimizer must not keep its scheduler alive.
        this = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if counter := this():
                counter._before(optimizer)

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if counter := this():
                counter._after(optimizer)

        before, after = map(_untraced, (before, after))
        self._hooks: list[weakref.finalize[..., StepCounter]] = []
        for optimizer in optimizers:
            if (known := _COUNTERS.get(optimizer)) and (other := known()):
                other._retire()
            _COUNTERS[optimizer] = this
            for handle in (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)):
                self._hooks.append(weakref.finalize(self, handle.remove))

    def go_on_from(self, steps: int) -> None:
        """Count from another number of steps, as that of a state that was loaded."""
        self.steps = steps
        self._done, self._gradients, self._sample, self._idle = [], [], None, 0

    def _retire(self) -> None:
        """See no more steps: another counter does."""
        for remove in self._hooks:
            remove()
        self._hooks = []

    @contextmanager
    def refusing_steps(self) -> Iterator[None]:
        """Refuse steps of the optimizers with a ClosureError in this context, where closures run."""
        self._refusing = True
        try:
            yield
        finally:
            self._refusing = False

    def check_in_use(self) -> None:
        """Raise a RuntimeError if another counter has taken the place of this one."""
        if not self._hooks:
            raise RuntimeError(
                f"another AutoLR was given {names_of(self._optimizers)} since, and sees its steps now: call the "
                "methods of that scheduler instead of this one's"
            )

    def end_iteration(self) -> None:
        """Begin the count of a new iteration, and tell what was wrong with the one that ended.

        Raises:
            RuntimeError: if the parameters moved and no step was seen, if no step is ever one of all optimizers, or
                if another AutoLR was given one of them since.
        """
        self.check_in_use()
        if self._done:
            left = [optimizer for optimizer in self._optimizers if optimizer not in self._done]
            self._incomplete += 1
            message = (
                f"{names_of(left)} did not step in an iteration in which {names_of(self._done)} did. A step counts "
                "when all optimizers of AutoLR have stepped: this one is not probed, and no step of total_steps. "
                "Call scheduler.step() once an iteration, after the steps of all"
            )
            self._done = []
            self._sample = None  # one of them moved
            if self.steps == 0 and self._incomplete == _ENOUGH:
                raise RuntimeError(f"{message}. This is so in all of the first {_ENOUGH} iterations")
            self._tell(message)
        elif self.steps == 0 or self._idle >= _ENOUGH:
            self._check_seen()
        self._idle += 1

    def _check_seen(self) -> None:
        """Raise if the parameters move and no step is seen."""
        now = sample(self._optimizers)
        if self._sample is None:
            self._sample = now
        elif now.shape == self._sample.shape and not torch.equal(now, self._sample):
            raise RuntimeError(
                f"the parameters moved, and AutoLR saw no step of {names_of(self._optimizers)}: something "
                "else moves them. Give AutoLR the optimizer whose step() does (of a wrapper, the one inside, such "
                "as sam.base_optimizer), and load weights before the first scheduler.step()"
            )
        gradients = [parameter.grad for parameter in self._optimizers.parameters if parameter.grad is not None]
        self._gradients = [(weakref.ref(gradient), gradient._version) for gradient in gradients]

    def _check_order(self) -> None:
        """Tell if the first step uses the very gradients that ``scheduler.step`` found: it came before."""
        if self._gradients and all(
            (gradient := found()) is not None and gradient._version == version for found, version in self._gradients
        ):
            self._tell(
                "Detected call of scheduler.step() before optimizer.step(): call optimizer.step() first, then "
                "scheduler.step(). AutoLR cannot match a step with its batch otherwise"
            )
        self._gradients = []

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        if self._stepping is optimizer and _calls_of_step(optimizer) > 1:
            self._inner += 1
            return
        self._stepping, self._inner = optimizer, 0
        if self._refusing:
            raise ClosureError("closure called optimizer.step(); a probe only needs the loss: " + REMEDY)
        if self._gradients:
            self._check_order()
        if not self._done:
            self._before_step(self.steps)
        self._before_each()

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        if self._inner:
            self._inner -= 1
            return
        self._stepping = None
        # Fused optimizers are called by a GradScaler even if it found an inf, and skip the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        if optimizer not in self._done:
            self._done.append(optimizer)
        self._moves |= any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if len(self._done) == len(self._optimizers):
            if not self._moves:  # there were no gradients
                self._done = []
                return
            self._moves = False
            self.steps += 1
            self._done = []
            self._idle = 0
            self._sample = None
            self._after_step(self.steps)


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that a compiled step does not trace: it would be compiled anew for what the hook reads."""
    disabled = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    def run(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # What is disabled takes longer to call, and is needed there alone.
        (disabled if torch.compiler.is_compiling() else hook)(optimizer, args, kwargs)

    return run


def _calls_of_step(optimizer: torch.optim.Optimizer) -> int:
    """Return how many calls of a step of the optimizer, one inside the other, are under way."""
    count, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _HOOKED and frame.f_locals.get("self") is optimizer:
            count += 1
    return count


_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__  # type: ignore[attr-defined]
