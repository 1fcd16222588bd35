"""Writers: operands are checked and planned once, and the candidates of N factors written again and again.

The operators write by a plan, one call for each device and dtype: boxing and checking a model's tensors takes the
host longer than a GPU writes them. Rows that are not dense, or not in the order of their inputs, are written by the
backend ``torch``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import plain  # noqa: F401, registers the backend that serves everywhere
from .backends import choose
from .buffer import are_dense
from .schemas import PLANNERS, overload

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
        out: P tensors ``[N, *shape]``, written in place; they share no memory with the inputs. Between calls their
            memory may move, and that of the inputs may not.
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
    if are_dense(rows, prev, now):
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
    if are_dense(rows, now, grad):
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
    if first and (chosen := choose(first[0].device.type, backend)) in PLANNERS:
        # Most models are of one kind, which an operator sees sooner than Python does.
        planned = Planned(chosen, first, second, lr, out)
        if planned.plan:
            return functools.partial(_write, count, [planned])
    calls: list[Writer] = []
    for device, is_dense, indices in _kinds(first, second, out, count):
        chosen = choose(device.type, backend) if is_dense else "torch"
        one, rows = [first[i] for i in indices], [out[i] for i in indices]
        other = [_in_order(second[i], first[i]) for i in indices]
        rates = None if lr is None else lr[indices].to(device)
        if chosen in PLANNERS:
            calls.append(Planned(chosen, one, other, rates, rows))
        else:
            operands = (one, other) if rates is None else (one, other, rates)
            calls.append(functools.partial(_write_plainly, overload(name, chosen), operands, rows))
    return functools.partial(_write, count, calls)


class Planned:
    """Writes by a plan, and makes another when its rows lie elsewhere, or Triton's tables are another stream's.

    Args:
        backend: one of those that plan.
        first, second, lr, out: as the operator ``plan`` takes them, on one device but for ``lr``.

    Attributes:
        plan: nothing if the tensors fit no single call.
    """

    def __init__(
        self,
        backend: str,
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        lr: Tensor | None,
        out: Sequence[Tensor],
    ):
        rates = None if lr is None else lr.to(first[0].device).contiguous()
        self._make = functools.partial(overload("plan", backend), list(first), list(second), rates, list(out))
        self._write = overload("write", backend)
        self._depends_on = [rows.data_ptr for rows in out]
        if backend == "triton" and out and out[0].is_cuda:
            self._depends_on.append(functools.partial(_stream_of, out[0].device))
        self._anchor = out[0].detach() if out else None
        self._found = [ask() for ask in self._depends_on]
        self.plan: list[Tensor] = self._make()

    def __call__(self, factors: Sequence[float]) -> None:
        found = [ask() for ask in self._depends_on]
        if found != self._found:
            self._found, self.plan = found, self._make()
        self._write(self.plan, factors, self._anchor)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _kinds(
    first: Sequence[Tensor], second: Sequence[Tensor], out: Sequence[Tensor], count: int
) -> list[tuple[torch.device, bool, list[int]]]:
    """Return the indices of the tensors with elements by device, dtype, and whether they are dense."""
    groups: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for index, (one, other, rows) in enumerate(zip(first, second, out, strict=True)):
        kind = (one.dtype, one.device)
        same = kind == (other.dtype, other.device) == (rows.dtype, rows.device)
        if not (same and one.shape == other.shape and rows.shape == (count, *one.shape)):
            found = ", ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in (one, other, rows))
            raise ValueError(f"tensors {index} are {found}: expected two alike, and {count} rows like them")
        if one.numel():
            groups.setdefault((one.device, one.dtype, are_dense(rows, one)), []).append(index)
    return [(device, is_dense, indices) for (device, _, is_dense), indices in groups.items()]


@torch.no_grad()
def _write_plainly(
    operator: Callable[..., None], operands: Sequence[object], rows: Sequence[Tensor], factors: Sequence[float]
) -> None:
    operator(*operands, factors, rows)


def _in_order(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a tensor with its elements in the order of a model's: itself, or a copy."""
    return tensor if tensor.stride() == model.stride() else torch.empty_like(model).copy_(tensor)


def _write(count: int, calls: Sequence[Writer], factors: Sequence[float]) -> None:
    if not 1 <= len(factors) <= MAX_ROWS:
        raise ValueError(f"factors has {len(factors)} values: give 1 to {MAX_ROWS}")
    if calls and len(factors) != count:
        raise ValueError(f"factors has {len(factors)} values and out {count} rows: give one for each")
    scales = [float(factor) for factor in factors]
    for call in calls:
        call(scales)
