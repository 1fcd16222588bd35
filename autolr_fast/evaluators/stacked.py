"""All candidates in one stacked buffer, evaluated by one batched forward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..candidates import Line, StackedBuffer
from ..memory import check_max_memory, free_memory
from .batched import Batched
from .substitution import Substitution

__all__ = ["Stacked"]


class Stacked(Batched):
    """All candidates written by one kernel into a preallocated buffer, which one batched forward reads.

    Extra memory: N copies of the parameters, kept from probe to probe (fewer if they do not fit ``max_memory``,
    or if memory runs out), and the activations of as many forwards.

    Args:
        max_memory: bytes for the buffer; by default a quarter of what is free on the parameters' device when
            the buffer is first made.

    Raises:
        ValueError: if ``max_memory`` is not a positive whole number.
    """

    def __init__(self, max_memory: int | None = None):
        super().__init__()
        self.max_memory = check_max_memory(max_memory)
        self._buffer: StackedBuffer | None = None

    @property
    def name(self) -> str:
        """``"stacked"``."""
        return "stacked"

    def _first_chunk(self, line: Line) -> int:
        one = sum(parameter.numel() * parameter.element_size() for parameter in line.parameters)
        budget = self.max_memory or free_memory(line.parameters[0].device) // 4
        return max(1, budget // max(1, one))

    def _operands(self, line: Line, factors: Sequence[float]) -> list[Tensor]:
        if self._buffer is None or not self._buffer.fits(line.parameters, len(factors)):
            self._release()  # the old one goes before the new one comes
            self._buffer = StackedBuffer(line.parameters, len(factors))
        stacked = [rows[: len(factors)] for rows in self._buffer.stacked]
        line.writer([parameter.detach() for parameter in line.parameters], stacked)(factors)
        return stacked

    def _substitution(
        self, line: Line, operands: Sequence[Tensor], buffers: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> Substitution:
        return _Rows([*line.parameters, *buffers], [*operands, *rows])

    def _release(self) -> None:
        self._buffer = None


class _Rows(Substitution):
    """Puts one tensor in the place of each."""

    def __init__(self, tensors: Sequence[Tensor], rows: Sequence[Tensor]):
        super().__init__(tensors)
        self._rows = rows

    def stand_in(self, index: int) -> Tensor:
        return self._rows[index]
