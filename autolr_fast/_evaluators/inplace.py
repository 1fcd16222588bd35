"""Candidates in the live parameters, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .._isolation import Closure, Isolation
from .._machine.ranks import local
from .._ops.copies import Copies
from .._steps import Line
from .base import Evaluator

__all__ = ["InPlace", "rewritten"]


class InPlace(Evaluator):
    """Writes each candidate into the live parameters, runs the closure, and puts the parameters back.

    Choose ``evaluator="inplace"`` for any model: compiled, DDP or FSDP2. Addresses stay those that compiled or
    captured graphs know, since only values change. The extra memory is one copy of the parameters. The time is N
    forwards.

    Examples:
        >>> from autolr_fast import AutoLR
        >>> model = nn.Linear(4, 1)
        >>> AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), model, evaluator=InPlace()).evaluator.name
        'inplace'
    """

    name = "inplace"

    @torch.no_grad()
    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`."""
        losses = []
        with rewritten(line.parameters) as (now, rows), Isolation(model, closure) as isolation:
            write = line.writer(now.values, rows)
            for factor in factors:
                write([factor])
                losses.append(isolation.run(closure).clone())  # a compiled closure's lies where its next will
        return torch.stack(losses)


@contextmanager
def rewritten(parameters: Sequence[nn.Parameter]) -> Iterator[tuple[Copies, list[Tensor]]]:
    """Give copies of the parameters, and the live ones as rows to be written to; put them back at the end."""
    with torch.no_grad():
        live = [each if type(each) is nn.Parameter else local(each) for each in parameters]
        now, rows = Copies(live), [tensor.unsqueeze(0) for tensor in live]
    try:
        yield now, rows
    finally:
        now.restore()
