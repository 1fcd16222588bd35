"""Which optimizer steps are probed, and the parameters from before them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .isolation import REMEDY, ClosureError

__all__ = ["Cadence", "Snapshots"]


@dataclass(frozen=True)
class Cadence:
    """Says for each optimizer step whether it is probed, and over how many steps back.

    The first ``calibrate`` steps are all probed, then every ``every``-th; ``windows`` take turns.

    Example:
        >>> cadence = Cadence(every=10, calibrate=3, windows=(1, 2))
        >>> {step: window for step in range(1, 41) if (window := cadence.window_at(step))}
        {1: 1, 2: 2, 3: 1, 10: 2, 20: 1, 30: 2, 40: 1}
        >>> [step for step in range(40) if cadence.wants_snapshot(step)]
        [0, 2, 8, 19, 28, 39]
    """

    every: int | None
    calibrate: int
    windows: Sequence[int]

    def window_at(self, step: int) -> int | None:
        """Return the window of the probe after ``step`` optimizer steps, or ``None`` if there is none."""
        if 1 <= step <= self.calibrate:
            turn = step - 1
        elif self.every and step >= 1 and step % self.every == 0:
            turn = step // self.every
        else:
            return None
        return min(self.windows[turn % len(self.windows)], step)

    def wants_snapshot(self, step: int, now: int | None = None) -> bool:
        """Whether a probe after ``now`` (default: ``step``) starts from the parameters after ``step`` steps."""
        first = step + 1 if now is None else now + 1
        return any(self.window_at(m) == m - step for m in range(first, step + max(self.windows) + 1))


class Snapshots:
    """Counts the real steps of an optimizer and keeps the parameters a later probe starts from.

    A snapshot is taken just before the optimizer step that opens a window and dropped once no probe needs it,
    so that between probes there is none. A step that a GradScaler skips, also inside a fused optimizer, is not
    counted.

    Args:
        optimizer: its step hooks are used; they go when this object goes.
        cadence: says which snapshots are wanted.

    Attributes:
        steps: optimizer steps counted so far.
        warm: whether momentum buffers were filled before the first of them.
        probing: while it is set, a step of the optimizer is refused.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, cadence: Cadence):
        self.steps = 0
        self.warm = False
        self.probing = False
        self._cadence = cadence
        self._taken: dict[int, dict[nn.Parameter, Tensor]] = {}
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

    def before_window(self, window: int) -> dict[nn.Parameter, Tensor] | None:
        """Return parameter -> value before the last ``window`` steps, or ``None`` if it was not kept."""
        return self._taken.get(self.steps - window)

    def drop_used(self) -> None:
        """Drop what no probe after the current step needs."""
        self._taken = {
            step: taken for step, taken in self._taken.items() if self._cadence.wants_snapshot(step, now=self.steps)
        }

    def state(self, parameters: Sequence[nn.Parameter]) -> dict[int, list[Tensor | None]]:
        """Return the open windows: step -> the value of each parameter, ``None`` where it has none."""
        return {step: [taken.get(p) for p in parameters] for step, taken in self._taken.items()}

    def load(self, steps: int, state: dict[int, list[Tensor | None]], parameters: Sequence[nn.Parameter]) -> None:
        """Take over a count and the open windows that :meth:`state` returned for the same parameters.

        Raises:
            ValueError: if they are of other parameters; nothing is taken over then.
        """
        for values in state.values():
            shapes = [None if value is None else value.shape for value in values]
            if len(values) != len(parameters) or any(
                shape not in (None, parameter.shape) for shape, parameter in zip(shapes, parameters, strict=True)
            ):
                raise ValueError(
                    f"state_dict has the snapshot of {len(values)} parameters and the optimizer {len(parameters)}, "
                    "or their shapes differ: load it for the model and the optimizer that it was saved with"
                )
        self.steps = steps
        self._taken = {
            int(step): {
                parameter: value.to(parameter.device, copy=True)
                for parameter, value in zip(parameters, values, strict=True)
                if value is not None
            }
            for step, values in state.items()
        }

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.probing:
            raise ClosureError("closure called optimizer.step(); a probe only needs the loss: " + REMEDY)
        if self.steps == 0:
            self.warm = any(state.get("momentum_buffer") is not None for state in optimizer.state.values())
        self.drop_used()
        if self._cadence.wants_snapshot(self.steps):
            self._taken[self.steps] = {
                parameter: parameter.detach().clone()
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.requires_grad or parameter.grad is not None
            }

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Fused optimizers are called by a GradScaler even if it found an inf, and skip the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.steps += 1
