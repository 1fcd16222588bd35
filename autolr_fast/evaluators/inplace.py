"""Candidates in the live parameters, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..candidates import Line, live_rows
from ..isolation import Closure, Isolation
from .base import Evaluator

__all__ = ["InPlace"]


class InPlace(Evaluator):
    """Writes each candidate into the live parameters, runs the closure, and puts the parameters back.

    Works with any model, since nothing but values changes: addresses stay what compiled or captured graphs
    know. Extra memory: one copy of the parameters. Time: N forwards.
    """

    @property
    def name(self) -> str:
        """``"inplace"``."""
        return "inplace"

    @torch.no_grad()
    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`."""
        rows = live_rows(line.parameters)
        now = [row[0].clone() for row in rows]
        losses = []
        try:
            with Isolation(model) as isolation:
                for factor in factors:
                    line.write([factor], now, rows)
                    losses.append(isolation.run(closure).detach())
        finally:
            ops.stack_candidates(now, now, [1.0], rows)
        return torch.stack(losses)
