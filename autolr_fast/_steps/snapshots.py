"""What is kept from before the optimizer steps that are probed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._machine.ranks import local
from .._ops.copies import Copies
from .._optimizers import Optimizers
from .lines import Line, StepLine
from .schedule import ProbeSchedule

__all__ = ["Snapshots"]


class Snapshots:
    """Keeps the parameters that the line of a later probe begins at.

    A snapshot is taken just before the optimizer step that opens a window, and dropped once no probe needs it.
    Between probes there is none.

    Args:
        optimizers: that move the parameters.
        schedule: says which snapshots are wanted; ``None`` for none.

    Attributes:
        began_warm: whether momentum buffers were filled before the first step.
    """

    def __init__(self, optimizers: Optimizers, schedule: ProbeSchedule | None):
        self._optimizers = optimizers
        self.began_warm = False
        self._schedule = schedule or ProbeSchedule(every_steps=None, first_steps=0, windows=(1,))
        self._kept: dict[int, dict[nn.Parameter, Tensor]] = {}  # optimizer steps before -> parameter -> its value

    def keep(self, steps: int) -> None:
        """Keep what the windows need that open now, after so many steps, before anything moves."""
        if steps == 0:
            states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
            self.began_warm = any(state.get("momentum_buffer") is not None for state in states)
        if self._kept:
            self.drop_used(steps)
        if self._schedule.windows_from(steps):
            moved = [each for each in self._optimizers.parameters if each.requires_grad or each.grad is not None]
            values = Copies([parameter.detach() for parameter in moved]).values
            self._kept[steps] = dict(zip(moved, values, strict=True))

    def line(self, window: int, steps: int, names: Mapping[nn.Parameter, str]) -> StepLine | None:
        """Return the line over the last ``window`` steps, or ``None`` if where it begins is not known.

        Args:
            window: of a probe that is due.
            steps: optimizer steps done.
            names: of all parameters, for errors.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device within the window.
        """
        kept = self._kept.get(steps - window)
        return None if kept is None else StepLine(kept, names, window)

    def retake(self, line: Line, ratio: float, steps: int) -> None:
        """Put the parameters where a line's steps, at ``ratio`` times their learning rates, would have ended.

        What is kept from between these steps moves towards where they began, as the parameters do.
        """
        if ratio == 1.0:
            return
        begin = steps - line.window
        for step, kept in self._kept.items():
            if begin < step < steps:
                for parameter, value in kept.items():
                    if (before := self._kept[begin].get(parameter)) is not None:  # else it joined later
                        torch.lerp(local(before), local(value), ratio, out=local(value))
        for index, live in enumerate(map(local, line.parameters)):  # one by one: no copy of all is made
            line.write_one(ratio, live.clone(), live, index)

    def drop_used(self, steps: int) -> None:
        """Drop what no probe after so many steps needs."""
        self._kept = {
            step: kept for step, kept in self._kept.items() if self._schedule.windows_from(step, now=steps)
        }

    def state(self) -> dict[str, Any]:
        """Return the open windows: the value of each parameter, ``None`` where there is none."""
        parameters = self._optimizers.parameters
        windows = [
            (step, [kept[parameter].clone() if parameter in kept else None for parameter in parameters])
            for step, kept in self._kept.items()
        ]
        return {"began_warm": self.began_warm, "windows": windows}

    def check(self, state: dict[str, Any]) -> None:
        """Raise a ValueError if a state is of other parameters; nothing is changed."""
        parameters = self._optimizers.parameters
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
        parameters = self._optimizers.parameters
        self.began_warm = state["began_warm"]
        self._kept = {
            step: {
                parameter: value.to(parameter.device, copy=True)
                for parameter, value in zip(parameters, values, strict=True)
                if value is not None
            }
            for step, values in state["windows"]
        }
