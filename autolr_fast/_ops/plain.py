"""The backend ``torch``: the operators in plain PyTorch, on any device. What the others are tested against.

Products and sums are rounded one by one (no fused multiply-add), so that every backend has the same bits in
float32 and float64. float16 and bfloat16 are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .schemas import LIBRARY

__all__: list[str] = []


def _stack_candidates(
    prev: Sequence[Tensor], now: Sequence[Tensor], factors: Sequence[float], out: Sequence[Tensor]
) -> None:
    for before, after, rows in zip(prev, now, out, strict=True):
        start, end = _wide(before), _wide(after)
        step = end - start
        for factor, row in zip(factors, rows.unbind(0), strict=True):
            # The end that is nearer is the base, as in torch.lerp, so that factors of 0 and 1 are exact.
            if abs(factor) < 0.5:
                _write(row, start, factor, step)
            else:
                _write(row, end, factor - 1.0, step)


def _stack_gradient_candidates(
    now: Sequence[Tensor], grad: Sequence[Tensor], lr: Tensor, factors: Sequence[float], out: Sequence[Tensor]
) -> None:
    for value, gradient, rate, rows in zip(now, grad, lr.unbind(0), out, strict=True):
        base, step = _wide(value), _wide(gradient)
        for factor, row in zip(factors, rows.unbind(0), strict=True):
            _write(row, base, -(factor * rate).to(base.dtype), step)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _write(row: Tensor, base: Tensor, coefficient: float | Tensor, step: Tensor) -> None:
    """Write ``base + coefficient * step``; with a coefficient of 0 the base, whatever the step."""
    if isinstance(coefficient, Tensor):
        row.copy_(torch.where(coefficient == 0, base, step * coefficient + base))
    elif coefficient == 0:
        row.copy_(base)
    elif row.dtype == base.dtype:
        torch.mul(step, coefficient, out=row)
        row.add_(base)
    else:
        row.copy_(step * coefficient + base)


for _name, _function in {
    "stack_candidates": _stack_candidates,
    "stack_gradient_candidates": _stack_gradient_candidates,
}.items():
    LIBRARY.impl(f"{_name}.torch", _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    # Being composite, it would be what fake tensors run; like the other backends it has nothing to fake.
    torch.library.register_fake(f"autolr_fast::{_name}.torch", lambda *args: None, lib=LIBRARY)
