"""Writers: operands are checked and grouped once, and the candidates of N factors written again and again.

The functions check and group; the operators only write, one call for each device and dtype. Rows that are not
dense, or not in the order of their inputs, are written by the backend ``torch``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import plain  # noqa: F401, registers the backend that serves everywhere
from .backends import choose
from .buffer import dense_strides
from .schemas import overload

__all__ = [
    "MAX_ROWS",
    "Writer",
    "candidate_writer",
    "gradient_candidate_writer",
    "write_candidate",
    "write_gradient_candidate",
]

MAX_ROWS = 64
"""Candidates that one call can write."""

Writer = Callable[[Sequence[float]], None]
"""Writes the candidates of N factors, 1 to 64; a ``ValueError`` if their number is not that of the rows."""


@torch.no_grad()
def candidate_writer(
    prev: Sequence[Tensor], now: Sequence[Tensor], out: Sequence[Tensor], *, backend: str | None = None
) -> Writer:
    """Return what writes ``prev + f * (now - prev)`` for every factor.

    Each input is read once and each output written once. A factor of 1 gives exactly ``now`` and one of 0 exactly
    ``prev``. All others follow the two-sided formula of :func:`torch.lerp`, rounded operation by operation.

    Args:
        prev: P tensors, of any shapes, strides, floating-point dtypes and devices.
        now: P tensors like them; one of other strides is copied, and may not change between calls.
        out: P tensors ``[N, *shape]``, written in place; they share no memory with the inputs.
        backend: one asked for by name; see :mod:`autolr_fast._ops.backends`.

    Raises:
        ValueError: if numbers, shapes, dtypes or devices do not match.
        BackendError: if the backend asked for cannot serve.

    Example:
        >>> out = torch.empty(3, 2)
        >>> write = candidate_writer([torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 3.0])], [out])
        >>> write([2.0, 1.0, 0.5])
        >>> out.tolist()
        [[2.0, 5.0], [1.0, 3.0], [0.5, 2.0]]
    """
    return _writer("stack_candidates", prev, now, None, out, backend)


@torch.no_grad()
def gradient_candidate_writer(
    now: Sequence[Tensor],
    grad: Sequence[Tensor],
    lr: Tensor,
    out: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> Writer:
    """Return what writes ``now - f * lr * grad`` for every factor; see :func:`candidate_writer`.

    Args:
        now: P tensors.
        grad: P tensors like them.
        lr: [P] float64.
        out: P tensors ``[N, *shape]``.
        backend: one asked for by name.

    Example:
        >>> out, lr = torch.empty(2, 1), torch.tensor([0.1], dtype=torch.float64)
        >>> gradient_candidate_writer([torch.tensor([1.0])], [torch.tensor([2.0])], lr, [out])([5.0, 0.0])
        >>> out.tolist()
        [[0.0], [1.0]]
    """
    return _writer("stack_gradient_candidates", now, grad, lr, out, backend)


@torch.no_grad()
def write_candidate(prev: Tensor, now: Tensor, factor: float, out: Tensor) -> None:
    """Write one tensor of one candidate: :func:`candidate_writer` where little else may be done.

    Args:
        prev: ``[*shape]``.
        now: a tensor like it.
        factor: what the step is scaled by.
        out: a tensor like them, written in place.

    Example:
        >>> out = torch.empty(2)
        >>> write_candidate(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), 2.0, out)
        >>> out.tolist()
        [2.0, 5.0]
    """
    rows = out.unsqueeze(0)
    if _are_dense(rows, prev, now):
        overload("stack_candidates", choose(now.device.type))([prev], [now], [factor], [rows])
    else:
        candidate_writer([prev], [now], [rows])([factor])


@torch.no_grad()
def write_gradient_candidate(now: Tensor, grad: Tensor, lr: Tensor, factor: float, out: Tensor) -> None:
    """Write one tensor of one candidate: :func:`gradient_candidate_writer` where little else may be done.

    Args:
        now: ``[*shape]``.
        grad: a tensor like it.
        lr: [1] float64, on the same device.
        factor: what ``lr * grad`` is scaled by.
        out: a tensor like them, written in place.

    Example:
        >>> out, lr = torch.empty(2), torch.tensor([0.5], dtype=torch.float64)
        >>> write_gradient_candidate(torch.ones(2), torch.ones(2), lr, 3.0, out)
        >>> out.tolist()
        [-0.5, -0.5]
    """
    rows = out.unsqueeze(0)
    if _are_dense(rows, now, grad):
        overload("stack_gradient_candidates", choose(now.device.type))([now], [grad], lr, [factor], [rows])
    else:
        gradient_candidate_writer([now], [grad], lr, [rows])([factor])


def _writer(
    name: str,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    lr: Tensor | None,
    out: Sequence[Tensor],
    backend: str | None,
) -> Writer:
    """Return what calls an operator with factors, once for each device and dtype."""
    if lr is not None and (lr.dtype != torch.float64 or lr.shape != (len(out),)):
        raise ValueError(f"lr is {lr.dtype} {list(lr.shape)}: expected torch.float64 [{len(out)}], one a tensor")
    count = len(out[0]) if out else 0
    groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}  # indices of the tensors with elements
    for index, (one, other, rows) in enumerate(zip(first, second, out, strict=True)):
        kind = (one.dtype, one.device)
        same = kind == (other.dtype, other.device) == (rows.dtype, rows.device)
        if not (same and one.shape == other.shape and rows.shape == (count, *one.shape)):
            found = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (one, other, rows))
            raise ValueError(f"tensors {index} are {found}: expected two alike, and {count} rows like them")
        if one.numel():
            groups.setdefault((one.device, one.dtype, _are_dense(rows, one)), []).append(index)
    calls: list[tuple[Callable[..., Any], list[Tensor]]] = []
    for (device, _, is_dense), indices in groups.items():
        chosen = choose(device.type, backend)
        operands: list[Any] = [[first[i] for i in indices], [_in_order(second[i], first[i]) for i in indices]]
        if lr is not None:
            operands.append((lr if len(indices) == len(out) else lr[indices]).to(device))
        operator = functools.partial(overload(name, chosen if is_dense else "torch"), *operands)
        calls.append((operator, [out[i] for i in indices]))
    return functools.partial(_write, count, calls)


def _are_dense(rows: Tensor, *inputs: Tensor) -> bool:
    """Whether the elements of all lie in one order without gaps, one row after another."""
    layout = dense_strides(inputs[0])
    follow = rows.shape[0] == 1 or rows.stride(0) == inputs[0].numel()
    return follow and layout == rows.stride()[1:] and all(layout == tensor.stride() for tensor in inputs)


def _in_order(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a tensor with its elements in the order of a model's: itself, or a copy."""
    return tensor if tensor.stride() == model.stride() else torch.empty_like(model).copy_(tensor)


@torch.no_grad()
def _write(count: int, calls: Sequence[tuple[Callable[..., Any], list[Tensor]]], factors: Sequence[float]) -> None:
    if not 1 <= len(factors) <= MAX_ROWS:
        raise ValueError(f"factors has {len(factors)} values: give 1 to {MAX_ROWS}")
    if calls and len(factors) != count:
        raise ValueError(f"factors has {len(factors)} values and out {count} rows: give one for each")
    scales = [float(factor) for factor in factors]
    for operator, rows in calls:
        operator(scales, rows)
