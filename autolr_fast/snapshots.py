"""Which optimizer steps are probed, and what is kept from before them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .candidates import Line, StepLine
from .copies import Copies
from .distributed import is_distributed, local
from .isolation import REMEDY, ClosureError
from .reconstruction import StateLine, sample, tells

__all__ = ["Cadence", "Snapshots", "windows_for"]


def windows_for(optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """Return the windows that suit an optimizer: 2 for plain SGD, 1 and 2 in turn with momentum, else 1 and 3.

    Near the highest rate that it bears, plain SGD crosses its steepest valley at each step, and one step alone then
    looks too long; over two the crossings cancel, and what is left is the progress. With other optimizers no line
    alone is best on all networks, so they take turns; the longer the second, the lower they settle.
    """
    if not all("dampening" in group for group in optimizer.param_groups):  # not SGD
        return (1, 3)
    return (2,) if all(group["momentum"] == 0 for group in optimizer.param_groups) else (1, 2)


@dataclass(frozen=True)
class Cadence:
    """Says for each optimizer step whether it is probed, and over how many steps back.

    The first ``calibrate`` steps are all probed, then every ``every``-th up to ``last``; ``windows`` take turns.

    Example:
        >>> cadence = Cadence(every=10, calibrate=3, windows=(1, 2), last=40)
        >>> {step: window for step in range(1, 99) if (window := cadence.window_at(step))}
        {1: 1, 2: 2, 3: 1, 10: 2, 20: 1, 30: 2, 40: 1}
        >>> {step: windows for step in range(99) if (windows := cadence.windows_from(step))}
        {0: [1, 2], 2: [1], 8: [2], 19: [1], 28: [2], 39: [1]}
    """

    every: int | None
    calibrate: int
    windows: Sequence[int]
    last: float = math.inf

    def window_at(self, step: int) -> int | None:
        """Return the window of the probe after ``step`` optimizer steps, or ``None`` if there is none."""
        if 1 <= step <= self.calibrate:
            turn = step - 1
        elif self.every and 1 <= step <= self.last and step % self.every == 0:
            turn = step // self.every
        else:
            return None
        return min(self.windows[turn % len(self.windows)], step)

    def windows_from(self, step: int, now: int | None = None) -> list[int]:
        """Return the windows of the probes after ``now`` (default: ``step``) that open after ``step`` steps."""
        first = step + 1 if now is None else now + 1
        return [m - step for m in range(first, step + max(self.windows) + 1) if self.window_at(m) == m - step]


class Snapshot(NamedTuple):
    """Parameter -> its value, or only :func:`~autolr_fast.reconstruction.sample` of it."""

    values: dict[nn.Parameter, Tensor]
    sampled: bool


class Snapshots:
    """Counts the real steps of an optimizer and keeps what the line of a later probe needs.

    A snapshot is taken just before the optimizer step that opens a window and dropped once no probe needs it,
    so that between probes there is none. Where the optimizer's state tells its last steps, samples are enough: they
    show whether it did. If not, that probe is left out, and whole parameters are kept from then on. A step that a
    GradScaler skips, also inside a fused optimizer, is not counted.

    Args:
        optimizer: its step hooks are used; they go when this object goes.
        cadence: says which snapshots are wanted.

    Attributes:
        steps: optimizer steps counted so far.
        warm: whether momentum buffers were filled before the first of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, cadence: Cadence):
        self.steps = 0
        self.warm = False
        self._refusing = False
        self._cadence = cadence
        self._taken: dict[int, Snapshot] = {}
        self._lrs: list[list[float]] = []  # of each param group in each of the last steps, where samples may do
        self._moved: set[nn.Parameter] = set()  # what had a gradient at the last step
        self._state_tells = True
        # The optimizer must not keep its scheduler alive.
        this = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if snapshots := this():
                snapshots._before_step(optimizer)

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if snapshots := this():
                snapshots._after_step(optimizer)

        for handle in (
            optimizer.register_step_pre_hook(before_step),
            optimizer.register_step_post_hook(after_step),
        ):
            weakref.finalize(self, handle.remove)

    def line(self, optimizer: torch.optim.Optimizer, window: int, names: Mapping[nn.Parameter, str]) -> Line | None:
        """Return the line over the last ``window`` steps, or ``None`` if it is not known.

        Args:
            optimizer: the one whose steps are counted.
            window: of a probe that is due.
            names: of all parameters, for errors.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device within the window.
        """
        taken = self._taken.get(self.steps - window)
        if taken is None:
            return None
        if self._state_tells and tells(optimizer, window) and not is_distributed():
            told = StateLine(optimizer, self._lrs, window, list(taken.values), self._moved)
            before = taken.values.items()
            samples = {parameter: value if taken.sampled else sample(value) for parameter, value in before}
            self._state_tells = told.agrees(samples)
            if self._state_tells:
                later = self._cadence.windows_from(self.steps - window, now=self.steps)
                if all(tells(optimizer, longer) for longer in later):
                    self._taken[self.steps - window] = Snapshot(samples, sampled=True)
                return told
        return None if taken.sampled else StepLine(taken.values, names, window)

    def retake(self, ratio: float, window: int) -> None:
        """Note that the last ``window`` steps were taken again at ``ratio`` times their learning rates.

        What is kept from between them moves towards where they began, as the parameters did.
        """
        self._lrs[-window:] = [[ratio * lr for lr in lrs] for lrs in self._lrs[-window:]]
        start = self._taken[self.steps - window]
        between = {step: taken for step, taken in self._taken.items() if self.steps - window < step < self.steps}
        for step, taken in between.items():
            if start.sampled and not taken.sampled:
                del self._taken[step]  # that probe is left out
                continue
            for parameter, value in taken.values.items():
                if (before := start.values.get(parameter)) is None:  # it joined later, and its steps stay
                    continue
                before = sample(before) if taken.sampled and not start.sampled else before
                torch.lerp(local(before), local(value), ratio, out=local(value))

    def drop_used(self) -> None:
        """Drop what no probe after the current step needs."""
        self._taken = {
            step: taken for step, taken in self._taken.items() if self._cadence.windows_from(step, now=self.steps)
        }

    def state(self, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        """Return what is kept: the open windows, with the value of each parameter, ``None`` where it has none."""
        return {
            "taken": {
                step: {"sampled": taken.sampled, "values": [taken.values.get(p) for p in parameters]}
                for step, taken in self._taken.items()
            },
            "lrs": [list(lrs) for lrs in self._lrs],
            "moved": [index for index, parameter in enumerate(parameters) if parameter in self._moved],
            "state_tells": self._state_tells,
        }

    def load(self, steps: int, state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        """Take over a count and what :meth:`state` returned for the same parameters.

        Raises:
            ValueError: if it is of other parameters; nothing is taken over then.
        """
        for taken in state["taken"].values():
            values = taken["values"]
            if len(values) != len(parameters) or any(
                value is not None
                and value.shape != (sample(parameter).shape if taken["sampled"] else parameter.shape)
                for value, parameter in zip(values, parameters, strict=True)
            ):
                raise ValueError(
                    f"state_dict has the snapshot of {len(values)} parameters and the optimizer {len(parameters)}, "
                    "or their shapes differ: load it for the model and the optimizer that it was saved with"
                )
        self.steps = steps
        self._lrs = [list(lrs) for lrs in state["lrs"]]
        self._moved = {parameters[index] for index in state["moved"]}
        self._state_tells = state["state_tells"]
        self._taken = {
            int(step): Snapshot(
                {
                    parameter: value.to(parameter.device, copy=True)
                    for parameter, value in zip(parameters, taken["values"], strict=True)
                    if value is not None
                },
                taken["sampled"],
            )
            for step, taken in state["taken"].items()
        }

    @contextmanager
    def refusing_steps(self) -> Iterator[None]:
        """Refuse steps of the optimizer with a ClosureError in this context, where closures run."""
        self._refusing = True
        try:
            yield
        finally:
            self._refusing = False

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._refusing:
            raise ClosureError("closure called optimizer.step(); a probe only needs the loss: " + REMEDY)
        if self.steps == 0:
            self.warm = any(state.get("momentum_buffer") is not None for state in optimizer.state.values())
        self.drop_used()
        lrs = [group["lr"] for group in optimizer.param_groups]
        if self._state_tells and not any(isinstance(lr, Tensor) for lr in lrs):
            self._lrs = [*self._lrs, lrs][-max(self._cadence.windows) :]
        if windows := self._cadence.windows_from(self.steps):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sampled = self._state_tells and all(tells(optimizer, window) for window in windows)
            # The probe of the first step must not be left out, and ranks must all make one or none.
            sampled = sampled and self.steps > 0 and not is_distributed()
            kept = [parameter for parameter in parameters if parameter.requires_grad or parameter.grad is not None]
            values = map(sample, kept) if sampled else Copies([parameter.detach() for parameter in kept]).values
            self._taken[self.steps] = Snapshot(dict(zip(kept, values, strict=True)), sampled)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Fused optimizers are called by a GradScaler even if it found an inf, and skip the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.steps += 1
            groups = optimizer.param_groups
            self._moved = {
                parameter for group in groups for parameter in group["params"] if parameter.grad is not None
            }
        else:
            del self._lrs[-1:]
