"""The stacked buffer: N candidates, or K stacked models, in one allocation for each device and dtype."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["StackedBuffer", "are_alike", "are_dense", "dense_strides"]


class StackedBuffer:
    """One flat allocation per (device, dtype) that holds ``rows`` candidates, parameter-major.

    Each parameter's candidates are contiguous, ``[rows, *shape]``, and keep the parameter's strides within a
    row, so that a batched operation reads its operand without a copy.

    Args:
        parameters: P parameters, of any shapes, dtypes and devices.
        rows: candidates held at once.

    Attributes:
        stacked: P tensors ``[rows, *shape]``, views of the flat allocations.

    Example:
        >>> buffer = StackedBuffer([torch.zeros(2, 3), torch.zeros(4)], rows=5)
        >>> [list(tensor.shape) for tensor in buffer.stacked]
        [[5, 2, 3], [5, 4]]
    """

    _ALIGNMENT = 64  # elements: every parameter starts on a cache line and on a vector load

    def __init__(self, parameters: Sequence[Tensor], rows: int):
        self.rows = rows
        self._layout = self._layout_of(parameters)
        sizes: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for p in parameters:
            sizes[p.device, p.dtype].append(math.ceil(rows * p.numel() / self._ALIGNMENT) * self._ALIGNMENT)
        parts = {
            (device, dtype): iter(torch.empty(sum(padded), device=device, dtype=dtype).split_with_sizes(padded))
            for (device, dtype), padded in sizes.items()
        }
        self.stacked = [
            next(parts[p.device, p.dtype]).as_strided((rows, *p.shape), (p.numel(), *dense_strides(p)))
            for p in parameters
        ]

    def fits(self, parameters: Sequence[Tensor], rows: int) -> bool:
        """Whether this buffer can hold ``rows`` candidates of these parameters."""
        return rows <= self.rows and self._layout == self._layout_of(parameters)

    @staticmethod
    def _layout_of(parameters: Sequence[Tensor]) -> list[tuple[object, ...]]:
        return [(p.shape, p.stride(), p.dtype, p.device) for p in parameters]


def dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's own strides if it is dense, else those of a dense tensor most like it."""
    if parameter.is_contiguous():
        return parameter.stride()
    return torch.empty_like(parameter, device="meta").stride()


def are_dense(rows: Tensor, *inputs: Tensor) -> bool:
    """Whether the elements of all lie in one order without gaps, one row after another."""
    layout = dense_strides(inputs[0])
    follow = rows.shape[0] == 1 or rows.stride(0) == inputs[0].numel()
    return follow and layout == rows.stride()[1:] and all(layout == tensor.stride() for tensor in inputs)


def are_alike(first: Sequence[Tensor], second: Sequence[Tensor], out: Sequence[Tensor]) -> bool:
    """Whether P inputs, others like them, and rows ``[N, *shape]`` of each are dense, of one dtype and device."""
    if not (first and len(first) == len(second) == len(out) and out[0].dim()):
        return False
    kind = first[0].dtype, first[0].device, len(out[0])
    return all(_are_alike(*each, *kind) for each in zip(first, second, out, strict=True))


def _are_alike(
    one: Tensor, other: Tensor, rows: Tensor, dtype: torch.dtype, device: torch.device, count: int
) -> bool:
    shape, strides, of_rows = one.shape, one.stride(), rows.stride()
    return (
        one.dtype == other.dtype == rows.dtype == dtype
        and one.device == other.device == rows.device == device
        and shape == other.shape
        and rows.shape == (count, *shape)
        and strides == other.stride() == of_rows[1:]
        and (count == 1 or of_rows[0] == one.numel() or not one.numel())
        and (one.is_contiguous() or strides == dense_strides(one))
    )
