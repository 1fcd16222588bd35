"""Where the candidates lie: a line through the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import _ops as ops
from .._machine.memory import SMALL
from .._machine.ranks import ProcessGroup, local, mean_over_ranks
from .host_memory import Away, Kept, here

__all__ = ["Line", "StepLine", "lengths", "squared_length"]


class Line(Protocol):
    """The candidates of a probe: one set of parameters for each factor.

    Attributes:
        parameters: the P live parameters that differ between candidates.
        window: how many optimizer steps lead along it to now; 0 if it does not end there.
    """

    parameters: list[nn.Parameter]
    window: int

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return a function that writes the candidates of N factors.

        Args:
            now: P tensors, the (local) parameters as training left them; they stay as they are between calls.
            rows: P tensors ``[N, *shape]``, written in place.
        """

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter ``[*shape]`` of one candidate."""


class StepLine:
    """``prev + f * (now - prev)``: what the optimizer did in its last ``window`` steps, scaled.

    ``f = 1`` is exactly ``now`` and ``f = 0`` exactly ``prev``; see :func:`autolr_fast._ops.candidate_writer`.
    Values that are away come back as they are written from: one parameter at a time, or parts of 16 MiB.

    Args:
        prev: parameter -> its (local) value before the window.
        names: parameter names, for the error.
        window: optimizer steps between ``prev`` and now.
        end: parameter -> where the line ends, if that is not now, as ``prev``; of those that are in both.

    Raises:
        RuntimeError: if a parameter changed its shape, dtype or device within the window.
    """

    def __init__(
        self,
        prev: Mapping[nn.Parameter, Kept],
        names: Mapping[nn.Parameter, str],
        window: int,
        end: Mapping[nn.Parameter, Kept] | None = None,
    ):
        for parameter, before in prev.items():
            own = local(parameter)
            now, then = (own.shape, own.dtype, own.device), (before.shape, before.dtype, before.device)
            if now != then:
                was, is_now = ((list(shape), *kind) for shape, *kind in (then, now))
                raise RuntimeError(
                    f"parameter {names[parameter]!r} was {was} {window} steps before and is {is_now} now: move or "
                    "convert the model before training"
                )
        self.parameters = [parameter for parameter in prev if end is None or parameter in end]
        self.window = window if end is None else 0
        self._prev = [prev[parameter] for parameter in self.parameters]
        self._end = None if end is None else [end[parameter] for parameter in self.parameters]

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return what writes ``prev + f * (now - prev)``; see :class:`Line`."""
        ends = now if self._end is None else self._end
        if any(isinstance(value, Away) for value in (*self._prev, *ends)):
            return partial(self._write_parts, ends, rows)
        return ops.candidate_writer([*map(here, self._prev)], [*map(here, ends)], rows)

    def _write_parts(self, ends: Sequence[Kept], rows: Sequence[Tensor], factors: Sequence[float]) -> None:
        for part in _parts(rows):
            prev, end = ([here(value) for value in values[part]] for values in (self._prev, ends))
            ops.candidate_writer(prev, end, rows[part])(factors)
            del prev, end  # before the next come

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter of one candidate; see :class:`Line`."""
        end = now if self._end is None else here(self._end[index])
        ops.write_candidate(here(self._prev[index]), end, factor, out)

    def squares(self) -> Tensor:
        """Return the squared length of the steps, and of the parameters that they begin at: [2] float64."""
        live = map(local, self.parameters)
        steps = (now - here(before) for now, before in zip(live, self._prev, strict=True))
        return torch.stack([squared_length(steps), squared_length(map(here, self._prev))])


def _parts(rows: Sequence[Tensor]) -> Iterator[slice]:
    """Return the parts of parameters that are small together, or one that is large."""
    start = size = 0
    for index, row in enumerate(rows):
        own = row[0].numel() * row.element_size()
        if size and size + own > SMALL:
            yield slice(start, index)
            start, size = index, 0
        size += own
    if rows:
        yield slice(start, len(rows))


def squared_length(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares of all elements, 0-dim float64 on the first one's device; one after another."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    device = norms[0].device if norms else None
    return sum((norm.square().to(device) for norm in norms), torch.zeros((), dtype=torch.float64, device=device))


def lengths(squares: Tensor, process_group: ProcessGroup | None) -> list[float]:
    """Return the length of the steps of a line, and of the parameters that they begin at.

    Args:
        squares: of the line.
        process_group: the ranks that hold parts of the parameters. Where each holds all, only the ratio is meant.
    """
    found: list[float] = mean_over_ranks(squares, process_group).sqrt().tolist()
    return found
