"""What is kept from before the optimizer steps that are probed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._machine.ranks import ProcessGroup, local, mean_over_ranks, shard_of
from .._optimizers import Optimizers
from .host_memory import Back, DeviceMemory, Kept, Memory, here, saved
from .lines import StepLine
from .schedule import ProbeSchedule
from .state_weights import StateWeights, has_state

__all__ = ["Snapshots"]


class Snapshots:
    """Keeps the parameters that the line of a later probe begins at.

    A snapshot is taken just before the optimizer step that opens a window, and dropped once no probe needs it.
    Between probes there is none. In the first steps, which may be taken again, it has the weights in the states of
    the optimizers too.

    Args:
        optimizers: that move the parameters.
        schedule: says which snapshots are wanted; ``None`` for none.
        memory: where they are kept; by default beside the parameters.

    Attributes:
        began_warm: whether momentum buffers were filled before the first step.
    """

    def __init__(self, optimizers: Optimizers, schedule: ProbeSchedule | None, memory: Memory | None = None):
        self._optimizers = optimizers
        self._memory = memory or DeviceMemory()
        self.began_warm = False
        self._schedule = schedule or ProbeSchedule(every_steps=None, first_steps=0, windows=(1,))
        self._kept: dict[int, dict[nn.Parameter, Kept]] = {}  # optimizer steps before -> parameter -> its value
        self._weights = StateWeights(optimizers)
        self._kept_weights: dict[int, dict[nn.Parameter, dict[str, Kept]]] = {}  # of the same snapshots
        self._is_new = False  # whether there was no state before the step that opened the last window
        self._loaded: list[int] = []  # steps of snapshots in a state that was loaded, which some ranks may lack

    def keep(self, steps: int) -> None:
        """Keep what the windows need that open now, after so many steps, before anything moves."""
        if steps == 0:
            states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
            self.began_warm = any(
                isinstance(state, dict) and state.get("momentum_buffer") is not None for state in states
            )
        if self._kept:
            self.drop_used(steps)
        if self._schedule.windows_from(steps):
            self._is_new = not any(map(has_state, self._optimizers))
            moved = [each for each in self._optimizers.parameters if each.requires_grad or each.grad is not None]
            values = self._memory.put([local(parameter) for parameter in moved])
            self._kept[steps] = dict(zip(moved, values, strict=True))
            if self._schedule.is_close(steps + 1):
                self._weights.find()
                self._kept_weights[steps] = {
                    parameter: dict(zip(entries, self._memory.put([*entries.values()]), strict=True))
                    for parameter, entries in self._weights.values().items()
                }

    def line(
        self,
        window: int,
        steps: int,
        names: Mapping[nn.Parameter, str],
        only: Collection[nn.Parameter] = (),
    ) -> StepLine | None:
        """Return the line over the last ``window`` steps, or ``None`` if where it begins is not known.

        Args:
            window: of a probe that is due.
            steps: optimizer steps done.
            names: of all parameters, for errors.
            only: the parameters that move along it; none of them for all that did.

        Raises:
            RuntimeError: if a parameter changed its shape, dtype or device within the window.
        """
        kept = self._kept.get(steps - window)
        if kept is not None and only:
            kept = {parameter: value for parameter, value in kept.items() if parameter in only}
        return StepLine(kept, names, window) if kept else None

    def lines_back(
        self, steps: int, names: Mapping[nn.Parameter, str]
    ) -> tuple[StepLine, StepLine] | tuple[None, None]:
        """Return two lines of where a step began some time ago, or ``None`` twice if that is not known.

        Args:
            steps: optimizer steps done.
            names: of all parameters, for errors.

        Returns:
            The line from there to where the last step began, and that from there to now.
        """
        span = self._schedule.mean_steps
        older, newer = (self._kept.get(steps - window) for window in (span, 1))
        if not (span and older and newer and older.keys() & newer.keys()):
            return None, None
        # What joined since stays where the last step began: there training saw the loss.
        return StepLine({**newer, **older}, names, span - 1, end=newer), StepLine(older, names, span)

    def retake(
        self, line: StepLine, ratio: float, steps: int, begin_anew: bool = False
    ) -> tuple[float | None, str]:
        """Put the parameters where a line's steps, at ``ratio`` times their learning rates, would have ended.

        What is kept from between these steps moves towards where they began, as the parameters do, and so do the
        weights in the states of the optimizers. A state with weights that the steps do not move, but start from
        again, cannot follow: a first step is undone then, and others stay. An undone first step leaves no state.

        Args:
            line: over steps that end now.
            ratio: 1 leaves all as it is.
            steps: optimizer steps done.
            begin_anew: whether the optimizers forget what such steps left in their states, if no weights are there.

        Returns:
            The ratio at which they were taken again, ``None`` if they stay; and what to tell the user.
        """
        if ratio == 1.0:
            return None, ""
        begin = steps - line.window
        kept = self._kept[begin]
        self._weights.find(Back(kept))
        before, along = self._kept_weights.get(begin, {}), set(line.parameters)
        entries = [
            (name, tensor, before.get(parameter, {}).get(name, kept[parameter]))
            for parameter, named in self._weights.values().items()
            if parameter in along
            for name, tensor in named.items()
        ]
        resting = _names_at_rest(entries)
        if resting and not self._is_new:
            return None, _told_of(resting, "stays as it is")
        if resting:
            ratio = 0.0
        if (ratio == 0.0 and self._is_new and line.window == 1) or (begin_anew and not entries):
            entries = []
            for optimizer in self._optimizers:
                optimizer.state.clear()
        for step in self._kept:
            if begin < step < steps:
                self._shorten(self._kept[step], kept, ratio)
                for parameter, named in self._kept_weights.get(step, {}).items():
                    self._shorten(named, before.get(parameter, {}), ratio)
        for _, tensor, value in entries:
            _scale(here(value).to(tensor), tensor, ratio)
        for index, live in enumerate(map(local, line.parameters)):  # one by one: no copy of all is made
            line.write_one(ratio, live.clone(), live, index)
        return ratio, _told_of(resting, "is undone") if resting else ""

    def _shorten(self, ends: dict[Any, Kept], begins: Mapping[Any, Kept], ratio: float) -> None:
        """Move values towards those that they began at; what has none joined later."""
        for key, kept in ends.items():
            if (begin := begins.get(key)) is not None:
                end = here(kept)
                _scale(here(begin), end, ratio)
                if end is not kept:
                    (ends[key],) = self._memory.put([end])

    def drop_all(self) -> None:
        """Drop what is kept, as where lines from there would go through what no step did."""
        self._kept, self._kept_weights = {}, {}

    def drop_used(self, steps: int) -> None:
        """Drop what no probe after so many steps needs."""
        self._kept = {
            step: kept for step, kept in self._kept.items() if self._schedule.windows_from(step, now=steps)
        }
        self._kept_weights = {step: kept for step, kept in self._kept_weights.items() if step in self._kept}

    def state(self) -> dict[str, Any]:
        """Return the open windows: the value of each parameter, ``None`` where there is none.

        What is kept in host memory is waited for, and comes on the CPU.
        """
        parameters = self._optimizers.parameters
        shard = shard_of(parameters)
        windows = tuple(
            (step, tuple(saved(kept[each]) if each in kept else None for each in parameters), shard)
            for step, kept in self._kept.items()
        )
        return {"began_warm": self.began_warm, "windows": windows}

    def weights_state(self) -> dict[str, Any]:
        """Return the weights in the states of the optimizers as they were when open windows began."""
        parameters = self._optimizers.parameters
        shard = shard_of(parameters)
        windows = tuple(
            (
                step,
                tuple(
                    {name: saved(each) for name, each in kept.get(parameter, {}).items()}
                    for parameter in parameters
                ),
                shard,
            )
            for step, kept in self._kept_weights.items()
        )
        return {"names": self._weights.state(), "windows": windows}

    def check(self, state: dict[str, Any]) -> None:
        """Raise a ValueError if a state is of other parameters; nothing is changed."""
        parameters = self._optimizers.parameters
        for _, values in self._own(state["windows"]):
            if len(values) != len(parameters) or any(
                value is not None and (value.shape, value.dtype) != (local(parameter).shape, parameter.dtype)
                for value, parameter in zip(values, parameters, strict=True)
            ):
                raise ValueError(
                    f"state_dict has the snapshot of {len(values)} parameters and the optimizer {len(parameters)}, "
                    "or their shapes or dtypes differ: load it for the model and the optimizer it was saved with"
                )

    def load(self, state: dict[str, Any], weights: dict[str, Any]) -> str:
        """Take over what :meth:`state` and :meth:`weights_state` returned for the same parameters.

        Snapshots of another rank's shards stay out. Before a probe uses any, :meth:`agree` asks whether all ranks
        have theirs.

        Returns:
            What to tell the user.
        """
        parameters = self._optimizers.parameters
        self.began_warm = state["began_warm"]
        windows = self._own(state["windows"])
        self._loaded = [step for step, *_ in state["windows"]] if shard_of(parameters) else []
        self._kept = {
            step: {
                parameter: self._put(value, parameter)
                for parameter, value in zip(parameters, values, strict=True)
                if value is not None
            }
            for step, values in windows
        }
        self._kept_weights = {
            step: {
                parameter: {name: self._put(value, parameter) for name, value in named.items()}
                for parameter, named in zip(parameters, values, strict=True)
                if named
            }
            for step, values in self._own(weights["windows"])
            if step in self._kept
        }
        self._weights.load(weights["names"])
        return "" if len(windows) == len(state["windows"]) else _OF_OTHERS

    def agree(self, process_group: ProcessGroup | None) -> str:
        """Drop the snapshots of a loaded state that not all ranks have; the first probe after loading asks.

        Args:
            process_group: the ranks that hold parts of the parameters.

        Returns:
            What to tell the user.
        """
        if not self._loaded:
            return ""
        loaded, self._loaded = self._loaded, []
        device = next(iter(self._optimizers.parameters)).device
        has = torch.tensor([float(step in self._kept) for step in loaded], device=device)
        shares = mean_over_ranks(has, process_group).tolist()
        lacking = {step for step, share in zip(loaded, shares, strict=True) if 0 < share < 1}
        self._kept = {step: kept for step, kept in self._kept.items() if step not in lacking}
        self._kept_weights = {step: kept for step, kept in self._kept_weights.items() if step in self._kept}
        return _OF_OTHERS if lacking else ""

    def _put(self, value: Tensor, parameter: nn.Parameter) -> Kept:
        """Keep a value that comes from a state as the snapshot of a parameter is kept."""
        (kept,) = self._memory.put([value.to(parameter.device)])
        return kept

    def _own(self, windows: Sequence[tuple[int, Sequence[Any], Sequence[int]]]) -> list[tuple[int, Any]]:
        """Return those windows of a state that are of what this rank holds of the parameters."""
        own = shard_of(self._optimizers.parameters)
        return [(step, values) for step, values, shard in windows if list(shard) == own]


_OF_OTHERS = (
    "the state of AutoLR that was loaded has the shards of one rank, and others need theirs: the probe that was "
    "under way is left out on all of them. To lose none, let each rank save and load its own scheduler.state_dict()"
)


def _scale(begin: Tensor, end: Tensor, ratio: float) -> None:
    """Scale a step in place; one of length 0 is undone also where it ended at what is not finite."""
    end.copy_(begin) if ratio == 0 else torch.lerp(begin, end, ratio, out=end)


def _names_at_rest(entries: Sequence[tuple[str, Tensor, Kept]]) -> list[str]:
    """Return the names of weights that steps which moved the parameters did not move."""
    moved = {name for name, tensor, before in entries if not torch.equal(tensor, here(before).to(tensor))}
    return sorted({name for name, *_ in entries} - moved)


def _told_of(resting: Sequence[str], done: str) -> str:
    """Return what to tell the user of a step that could not be taken again."""
    names = ", ".join(map(repr, resting))
    return (
        f"the optimizer computes its steps from weights in its state ({names}) that no step moves: the step that "
        f"AutoLR would take again {done}. Start from a learning rate near the one that AutoLR finds"
    )
