"""The steps of the optimizers: counted, and refused while closures run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._isolation import REMEDY, ClosureError
from .._machine.ranks import local
from .._machine.warning import warn
from .._optimizers import Optimizers, names_of

__all__ = ["StepCounter"]

_ENOUGH = 20  # iterations in which not all optimizers stepped, with none in which they did


class StepCounter:
    """Counts the real steps: one is done when each optimizer has stepped, in any order.

    A step that a GradScaler skips, also inside a fused optimizer, is not counted.

    Args:
        optimizers: their step hooks are used; they go when this object goes.
        tell: warns the user, once of each thing.
        before_step: called with ``steps`` before the first optimizer of a step moves anything.
        before_each: called before each optimizer steps.

    Attributes:
        steps: optimizer steps counted so far.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        tell: Callable[[str], None] = warn,
        before_step: Callable[[int], None] = lambda steps: None,
        before_each: Callable[[], None] = lambda: None,
    ):
        self.steps = 0
        self._optimizers = optimizers
        self._tell = tell
        self._before_step = before_step
        self._before_each = before_each
        self._done: list[torch.optim.Optimizer] = []  # stepped in this iteration
        self._refusing = False
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

        for optimizer in optimizers:
            for handle in (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)):
                weakref.finalize(self, handle.remove)

    @contextmanager
    def refusing_steps(self) -> Iterator[None]:
        """Refuse steps of the optimizers with a ClosureError in this context, where closures run."""
        self._refusing = True
        try:
            yield
        finally:
            self._refusing = False

    def end_iteration(self) -> None:
        """Begin the count of a new iteration, and tell what was wrong with the one that ended.

        Raises:
            RuntimeError: if the parameters moved and no step was seen, or if no step is ever one of all optimizers.
        """
        if self._done:
            left = [optimizer for optimizer in self._optimizers if optimizer not in self._done]
            self._incomplete += 1
            message = (
                f"{names_of(left)} did not step in an iteration in which {names_of(self._done)} did. A step counts "
                "when all optimizers of AutoLR have stepped: this one is not probed, and no step of total_steps. "
                "Call scheduler.step() once an iteration, after the steps of all"
            )
            self._done = []
            if self.steps == 0 and self._incomplete == _ENOUGH:
                raise RuntimeError(f"{message}. This is so in all of the first {_ENOUGH} iterations")
            self._tell(message)
        elif self.steps == 0:
            self._check_seen()

    def _check_seen(self) -> None:
        """Raise if the parameters move and no step is seen."""
        sample = _sample(self._optimizers)
        if self._sample is None:
            self._sample = sample
        elif sample.shape == self._sample.shape and not torch.equal(sample, self._sample):
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
        if self._refusing:
            raise ClosureError("closure called optimizer.step(); a probe only needs the loss: " + REMEDY)
        if self._gradients:
            self._check_order()
        if not self._done:
            self._before_step(self.steps)
        self._before_each()

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        # Fused optimizers are called by a GradScaler even if it found an inf, and skip the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        if optimizer not in self._done:
            self._done.append(optimizer)
        if len(self._done) == len(self._optimizers):
            self.steps += 1
            self._done = []


def _sample(optimizers: Optimizers) -> Tensor:
    """Return an element of each parameter, on the CPU: little, and a step moves nearly all."""
    firsts = [local(parameter).detach().flatten()[:1].double().cpu() for parameter in optimizers.parameters]
    return torch.cat(firsts)
