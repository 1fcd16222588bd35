"""Where the candidates lie: a line through the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from .. import _ops as ops
from .._machine.ranks import local

__all__ = ["Line", "StepLine"]


class Line(Protocol):
    """The candidates of a probe: one set of parameters for each factor.

    Attributes:
        parameters: the P live parameters that differ between candidates.
        window: how many optimizer steps it spans; 0 if it follows a fresh gradient.
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

    Args:
        prev: parameter -> its value before the window.
        names: parameter names, for the error.
        window: optimizer steps between ``prev`` and now.

    Raises:
        RuntimeError: if a parameter changed its shape, dtype or device within the window.
    """

    def __init__(self, prev: Mapping[nn.Parameter, Tensor], names: Mapping[nn.Parameter, str], window: int):
        for parameter, before in prev.items():
            now, then = (
                (parameter.shape, parameter.dtype, parameter.device),
                (before.shape, before.dtype, before.device),
            )
            if now != then:
                was, is_now = ((list(shape), *kind) for shape, *kind in (then, now))
                raise RuntimeError(
                    f"parameter {names[parameter]!r} was {was} before the step and is {is_now} now: move or "
                    "convert the model before training, not between optimizer.step() and scheduler.step()"
                )
        self.parameters = list(prev)
        self.window = window
        self._prev = [local(before) for before in prev.values()]

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return what writes ``prev + f * (now - prev)``; see :class:`Line`."""
        return ops.candidate_writer(self._prev, now, rows)

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter of one candidate; see :class:`Line`."""
        ops.write_candidate(self._prev[index], now, factor, out)
