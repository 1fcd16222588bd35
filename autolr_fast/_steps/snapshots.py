"""What is kept from before the optimizer steps that are probed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._isolation import REMEDY, ClosureError
from .._machine.ranks import local
from .._ops.copies import Copies
from .lines import Line, StepLine
from .schedule import ProbeSchedule

__all__ = ["Snapshots"]


class Snapshots:
    """Counts the real steps of an optimizer, and keeps the parameters that the line of a later probe begins at.

    A snapshot is taken just before the optimizer step that opens a window, and dropped once no probe needs it.
    Between probes there is none. A step that a GradScaler skips, also inside a fused optimizer, is not counted.

    Args:
        optimizer: its step hooks are used; they go when this object goes.
        schedule: says which snapshots are wanted; ``None`` for none.

    Attributes:
        steps: optimizer steps counted so far.
        began_warm: whether momentum buffers were filled before the first of them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: ProbeSchedule | None):
        self._optimizer = optimizer
        self.steps = 0
        self.began_warm = False
        self._refusing = False
        self._schedule = schedule or ProbeSchedule(every_steps=None, first_steps=0, windows=(1,))
        self._kept: dict[int, dict[nn.Parameter, Tensor]] = {}  # optimizer steps before -> parameter -> its value
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

    def line(self, window: int, names: Mapping[nn.Parameter, str]) -> StepLine | None:
        """Return the line over the last ``window`` steps, or ``None`` if where it begins is not known.

        Args:
            window: of a probe that is due.
            names: of all parameters, for errors.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device within the window.
        """
        kept = self._kept.get(self.steps - window)
        return None if kept is None else StepLine(kept, names, window)

    def retake(self, line: Line, ratio: float) -> None:
        """Put the parameters where a line's steps, at ``ratio`` times their learning rates, would have ended.

        What is kept from between these steps moves towards where they began, as the parameters do.
        """
        if ratio == 1.0:
            return
        begin = self.steps - line.window
        for step, kept in self._kept.items():
            if begin < step < self.steps:
                for parameter, value in kept.items():
                    if (before := self._kept[begin].get(parameter)) is not None:  # else it joined later
                        torch.lerp(local(before), local(value), ratio, out=local(value))
        for index, live in enumerate(map(local, line.parameters)):  # one by one: no copy of all is made
            line.write_one(ratio, live.clone(), live, index)

    def drop_used(self) -> None:
        """Drop what no probe after the current step needs."""
        self._kept = {
            step: kept for step, kept in self._kept.items() if self._schedule.windows_from(step, now=self.steps)
        }

    def state(self) -> dict[str, Any]:
        """Return the count and the open windows: the value of each parameter, ``None`` where there is none."""
        parameters = self._parameters()
        windows = [
            (step, [kept[parameter].clone() if parameter in kept else None for parameter in parameters])
            for step, kept in self._kept.items()
        ]
        return {"steps": self.steps, "began_warm": self.began_warm, "windows": windows}

    def check(self, state: dict[str, Any]) -> None:
        """Raise a ValueError if a state is of other parameters; nothing is changed."""
        parameters = self._parameters()
        for _, values in state["windows"]:
            if len(values) != len(parameters) or any(
                value is not None and (value.shape, value.dtype) != (parameter.shape, parameter.dtype)
                for value, parameter in zip(values, parameters, strict=True)
            ):
                raise ValueError(
                    f"state_dict has the snapshot of {len(values)} parameters and the optimizer {len(parameters)}, "
                    "or their shapes or dtypes differ: load it for the model and the optimizer it was saved with"
                )

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned for the same parameters; :meth:`check` it first."""
        parameters = self._parameters()
        self.steps, self.began_warm = state["steps"], state["began_warm"]
        self._kept = {
            step: {
                parameter: value.to(parameter.device, copy=True)
                for parameter, value in zip(parameters, values, strict=True)
                if value is not None
            }
            for step, values in state["windows"]
        }

    @contextmanager
    def refusing_steps(self) -> Iterator[None]:
        """Refuse steps of the optimizer with a ClosureError in this context, where closures run."""
        self._refusing = True
        try:
            yield
        finally:
            self._refusing = False

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._refusing:
            raise ClosureError("closure called optimizer.step(); a probe only needs the loss: " + REMEDY)
        if self.steps == 0:
            self.began_warm = any(state.get("momentum_buffer") is not None for state in optimizer.state.values())
        if self._kept:
            self.drop_used()
        if self._schedule.windows_from(self.steps):
            moved = [each for each in self._parameters() if each.requires_grad or each.grad is not None]
            values = Copies([parameter.detach() for parameter in moved]).values
            self._kept[self.steps] = dict(zip(moved, values, strict=True))

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Fused optimizers are called by a GradScaler even if it found an inf, and skip the step inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.steps += 1
