"""What is done to all parameters at once: one operator call for each (device, dtype), by the fastest backend.

The functions check and group; the operators only write. A fast backend sees tensors whose elements lie in the same
order in memory without gaps: where that is not so, a function copies to a tensor where it is, and back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..scoring import NORMALIZATIONS
from . import plain  # noqa: F401, registers the backend that serves everywhere
from .backends import VARIABLE, BackendError, Choice, choose, explain
from .schemas import BACKENDS, SCHEMAS, overload

__all__ = [
    "BACKENDS",
    "MAX_ROWS",
    "SCHEMAS",
    "VARIABLE",
    "BackendError",
    "Choice",
    "Writer",
    "candidate_writer",
    "choose",
    "explain",
    "gradient_candidate_writer",
    "score",
    "stack_candidates",
    "stack_gradient_candidates",
    "stacked_sgd_step",
    "write_candidate",
    "write_gradient_candidate",
]

MAX_ROWS = 64
"""Candidates, or stacked models, that one call can write."""

Writer = Callable[[Sequence[float]], None]
"""Writes the candidates of N factors."""


@torch.no_grad()
def stack_candidates(
    prev: Sequence[Tensor],
    now: Sequence[Tensor],
    factors: Sequence[float],
    out: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> None:
    """Write ``prev + f * (now - prev)`` for every factor: each input is read once, each output written once.

    A factor of 1 gives exactly ``now`` and one of 0 exactly ``prev``; in between and beyond it is the two-sided
    formula of :func:`torch.lerp`, from the nearer end, rounded operation by operation.

    Args:
        prev: P tensors, of any shapes, strides, floating-point dtypes and devices.
        now: P tensors like them.
        factors: N numbers, 1 to 64.
        out: P tensors ``[N, *shape]``, written in place; they share no memory with the inputs.
        backend: one asked for by name; see :mod:`autolr_fast.ops.backends`.

    Raises:
        ValueError: if numbers, shapes, dtypes or devices do not match.
        TypeError: if a tensor is not of a floating-point dtype.
        BackendError: if the backend asked for cannot serve.

    Example:
        >>> out = torch.empty(3, 2)
        >>> stack_candidates([torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 3.0])], [2.0, 1.0, 0.5], [out])
        >>> out.tolist()
        [[2.0, 5.0], [1.0, 3.0], [0.5, 2.0]]
    """
    factors = _check_count("factors", factors)
    _writer("stack_candidates", len(factors), {"prev": prev, "now": now}, out, backend)(factors)


@torch.no_grad()
def candidate_writer(
    prev: Sequence[Tensor], now: Sequence[Tensor], out: Sequence[Tensor], *, backend: str | None = None
) -> Writer:
    """Return a function of N factors that does what :func:`stack_candidates` does, but checks nothing twice.

    Args:
        prev: as in :func:`stack_candidates`; a change between calls may or may not be noticed.
        now: likewise.
        out: P tensors ``[N, *shape]``.
        backend: as in :func:`stack_candidates`.

    Example:
        >>> out = torch.empty(1, 2)
        >>> write = candidate_writer([torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 3.0])], [out])
        >>> write([2.0])
        >>> out.tolist()
        [[2.0, 5.0]]
    """
    return _writer("stack_candidates", _count(out), {"prev": prev, "now": now}, out, backend)


@torch.no_grad()
def write_candidate(prev: Tensor, now: Tensor, factor: float, out: Tensor, *, backend: str | None = None) -> None:
    """Write one tensor of one candidate: :func:`stack_candidates` where little else may be done.

    Args:
        prev: ``[*shape]``.
        now: a tensor like it.
        factor: what the step is scaled by.
        out: a tensor like them, written in place.
        backend: as in :func:`stack_candidates`.

    Example:
        >>> out = torch.empty(2)
        >>> write_candidate(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]), 2.0, out)
        >>> out.tolist()
        [2.0, 5.0]
    """
    if _are_alike(prev, now, out):
        operator = overload("stack_candidates", choose(now.device.type, backend))
        operator([prev], [now], [factor], [out.unsqueeze(0)])
    else:
        stack_candidates([prev], [now], [factor], [out.unsqueeze(0)], backend=backend)


@torch.no_grad()
def write_gradient_candidate(
    now: Tensor, grad: Tensor, lr: Tensor, factor: float, out: Tensor, *, backend: str | None = None
) -> None:
    """Write one tensor of one candidate: :func:`stack_gradient_candidates` where little else may be done.

    Args:
        now: ``[*shape]``.
        grad: a tensor like it.
        lr: [1] float64, on the same device.
        factor: what ``lr * grad`` is scaled by.
        out: a tensor like them, written in place.
        backend: as in :func:`stack_candidates`.

    Example:
        >>> out, lr = torch.empty(2), torch.tensor([0.5], dtype=torch.float64)
        >>> write_gradient_candidate(torch.ones(2), torch.ones(2), lr, 3.0, out)
        >>> out.tolist()
        [-0.5, -0.5]
    """
    if _are_alike(now, grad, out):
        operator = overload("stack_gradient_candidates", choose(now.device.type, backend))
        operator([now], [grad], lr, [factor], [out.unsqueeze(0)])
    else:
        stack_gradient_candidates([now], [grad], lr, [factor], [out.unsqueeze(0)], backend=backend)


@torch.no_grad()
def stack_gradient_candidates(
    now: Sequence[Tensor],
    grad: Sequence[Tensor],
    lr: Tensor,
    factors: Sequence[float],
    out: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> None:
    """Write ``now - f * lr * grad`` for every factor; arguments as in :func:`stack_candidates`, and ``lr`` [P].

    Example:
        >>> out, lr = torch.empty(2, 1), torch.tensor([0.1], dtype=torch.float64)
        >>> stack_gradient_candidates([torch.tensor([1.0])], [torch.tensor([2.0])], lr, [5.0, 0.0], [out])
        >>> out.tolist()
        [[0.0], [1.0]]
    """
    factors = _check_count("factors", factors)
    _writer("stack_gradient_candidates", len(factors), {"now": now, "grad": grad}, out, backend, lr)(factors)


@torch.no_grad()
def gradient_candidate_writer(
    now: Sequence[Tensor],
    grad: Sequence[Tensor],
    lr: Tensor,
    out: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> Writer:
    """Return a function that does what :func:`stack_gradient_candidates` does; see :func:`candidate_writer`.

    Example:
        >>> out, lr = torch.empty(1, 1), torch.tensor([0.1], dtype=torch.float64)
        >>> write = gradient_candidate_writer([torch.tensor([1.0])], [torch.tensor([2.0])], lr, [out])
        >>> write([5.0])
        >>> out.tolist()
        [[0.0]]
    """
    return _writer("stack_gradient_candidates", _count(out), {"now": now, "grad": grad}, out, backend, lr)


@torch.no_grad()
def stacked_sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    dampening: Sequence[float],
    nesterov: Sequence[bool],
    first_step: bool,
    backend: str | None = None,
) -> None:
    """Take one step of :class:`torch.optim.SGD` for each of K stacked models, each with its own settings.

    Args:
        params: P tensors ``[K, *shape]``, updated in place.
        grads: P tensors like them.
        momentum_buffers: P tensors like them, updated in place, not touched for a model without momentum; may be
            left out if none has any.
        lr: K learning rates, 1 to 64.
        momentum: K numbers.
        weight_decay: K numbers.
        dampening: K numbers.
        nesterov: K of them.
        first_step: whether the momentum buffers are still to be set to the gradients.
        backend: one asked for by name; see :mod:`autolr_fast.ops.backends`.

    Raises:
        ValueError: if numbers, shapes, dtypes or devices do not match.
        TypeError: if a tensor is not of a floating-point dtype.
        BackendError: if the backend asked for cannot serve.

    Example:
        >>> param, grad = torch.ones(2, 1), torch.ones(2, 1)
        >>> plain = {"momentum": [0, 0], "weight_decay": [0, 0], "dampening": [0, 0], "nesterov": [False, False]}
        >>> stacked_sgd_step([param], [grad], lr=[0.5, 0.25], **plain, first_step=True)
        >>> param.tolist()
        [[0.5], [0.75]]
    """
    lr = _check_count("lr", lr)
    settings = {"momentum": momentum, "weight_decay": weight_decay, "dampening": dampening, "nesterov": nesterov}
    for name, values in settings.items():
        if len(values) != len(lr):
            raise ValueError(f"{name} has {len(values)} values and lr {len(lr)}: give one for each model")
    if any(momentum) and not momentum_buffers:
        raise ValueError(f"momentum={list(momentum)} without momentum_buffers: give one for each of params")
    stacked = {"params": params, "grads": grads}
    if momentum_buffers:
        stacked["momentum_buffers"] = momentum_buffers
    _check_tensors(len(lr), {}, stacked)
    for device, indices in _groups(params):
        rows = _Rows([params[i] for i in indices])
        present = indices if momentum_buffers else []
        buffers = _Rows([momentum_buffers[i] for i in present], like=rows if present else None)
        gradients = _Rows([grads[i] for i in indices], like=rows)
        operator = overload("stacked_sgd_step", choose(device.type, backend))
        operator(rows.dense, gradients.dense, buffers.dense, lr, *settings.values(), first_step)
        rows.copy_back()
        buffers.copy_back()


def score(
    losses: Tensor,
    factors: Sequence[float],
    level: Tensor,
    *,
    normalize: str = "minmax",
    exponent: float = 1.0,
    lowest: float = 0.0,
    highest: float = math.inf,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Weigh the factors by ``exp(-x)`` of the normalised losses, and move the level; nothing waits for the device.

    Args:
        losses: [N] float64.
        factors: N positive numbers, 1 to 64.
        level: 0-dim float64 on the same device; becomes ``level * factor ** exponent``, within the limits.
        normalize: a name in :data:`autolr_fast.scoring.NORMALIZATIONS`.
        exponent: what the logarithm of the factor is scaled by.
        lowest: lower limit of the level.
        highest: upper limit of the level.
        backend: one asked for by name; see :mod:`autolr_fast.ops.backends`.

    Returns:
        ``(weights, factor)`` as :func:`autolr_fast.scoring.weigh` defines them.

    Raises:
        ValueError: if numbers, dtypes or devices do not match, or the normalisation is not known.
        BackendError: if the backend asked for cannot serve.

    Example:
        >>> level = torch.tensor(0.1, dtype=torch.float64)
        >>> weights, factor = score(torch.tensor([0.9, 1.0, 1.2], dtype=torch.float64), [2.0, 1.0, 0.5], level)
        >>> round(factor.item(), 3), round(level.item(), 4)
        (1.234, 0.1234)
    """
    factors = _check_count("factors", factors)
    for name, tensor, shape in (("losses", losses, (len(factors),)), ("level", level, ())):
        if tensor.dtype != torch.float64 or tensor.shape != shape or tensor.device != level.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected torch.float64 "
                f"{list(shape)} on {level.device}"
            )
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r} is not known: use one of {', '.join(NORMALIZATIONS)}")
    weights, factor = torch.empty_like(losses), torch.empty_like(level)
    operator = overload("score", choose(level.device.type, backend))
    operator(losses.contiguous(), factors, normalize, exponent, lowest, highest, level, weights, factor)
    return weights, factor


def _are_alike(a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether three tensors have elements, in the same order without gaps, and the same shape and dtype."""
    if not (a.is_contiguous() and a.numel() and a.dtype == b.dtype == c.dtype and a.shape == b.shape == c.shape):
        return False
    return a.stride() == b.stride() == c.stride() and a.device == b.device == c.device


def _count(out: Sequence[Tensor]) -> int:
    """Return how many rows stacked tensors have."""
    return len(out[0]) if out and out[0].dim() else 0


def _writer(
    name: str,
    count: int,
    inputs: dict[str, Sequence[Tensor]],
    out: Sequence[Tensor],
    backend: str | None,
    lr: Tensor | None = None,
) -> Writer:
    """Return what calls an operator with factors, once for each device and dtype."""
    _check_tensors(count, inputs, {"out": out})
    if lr is not None and (lr.dtype != torch.float64 or lr.shape != (len(out),)):
        raise ValueError(f"lr is {lr.dtype} {list(lr.shape)}: expected torch.float64 [{len(out)}], one a tensor")
    calls: list[tuple[Callable[..., Any], _Rows]] = []
    for device, indices in _groups(next(iter(inputs.values()))):
        rows = _Rows([out[i] for i in indices])
        operands: list[Any] = [rows.align(tensors[i] for i in indices) for tensors in inputs.values()]
        if lr is not None:
            operands.append((lr if len(indices) == len(out) else lr[indices]).to(device))
        operator = overload(name, choose(device.type, backend))
        calls.append((functools.partial(operator, *operands), rows))
    return functools.partial(_write, count, calls)


@torch.no_grad()
def _write(count: int, calls: Sequence[tuple[Callable[..., Any], _Rows]], factors: Sequence[float]) -> None:
    factors = _check_count("factors", factors)
    if calls and len(factors) != count:
        raise ValueError(f"factors has {len(factors)} values and out {count} rows: give one for each")
    for operator, rows in calls:
        operator(factors, rows.dense)
        rows.copy_back()


class _Rows:
    """P stacked tensors ``[N, *shape]`` whose rows are dense and follow each other, or such stand-ins for them."""

    def __init__(self, stacked: Sequence[Tensor], like: _Rows | None = None):
        self._layouts: list[tuple[int, ...]] = (
            [_row_strides(tensor) for tensor in stacked] if like is None else like._layouts
        )
        self._stacked = stacked
        self.dense = [
            tensor if _is_back_to_back(tensor, layout) else _aligned(tensor, layout)
            for tensor, layout in zip(stacked, self._layouts, strict=True)
        ]

    def align(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the tensors ``[*shape]`` with their elements in the order of a row's."""
        return [
            tensor if tensor.stride() == layout else _aligned(tensor.unsqueeze(0), layout)[0]
            for tensor, layout in zip(tensors, self._layouts, strict=True)
        ]

    def copy_back(self) -> None:
        """Bring what was written to stand-ins to where it belongs."""
        for tensor, dense in zip(self._stacked, self.dense, strict=True):
            if tensor is not dense:
                tensor.copy_(dense)


def _row_strides(stacked: Tensor) -> tuple[int, ...]:
    """Return the strides of a row ``[*shape]`` if it is dense, else those of a dense tensor most like it."""
    if stacked.is_contiguous() or stacked[0].is_contiguous():
        return stacked.stride()[1:]
    return torch.empty_like(stacked[0], device="meta").stride()


def _is_back_to_back(stacked: Tensor, layout: tuple[int, ...]) -> bool:
    follow = len(stacked) == 1 or stacked.stride(0) * len(stacked) == stacked.numel()
    return follow and stacked.stride()[1:] == layout


def _aligned(stacked: Tensor, layout: tuple[int, ...]) -> Tensor:
    dense = torch.empty_strided(
        stacked.shape, (stacked[0].numel(), *layout), dtype=stacked.dtype, device=stacked.device
    )
    return dense.copy_(stacked)


def _groups(tensors: Sequence[Tensor]) -> list[tuple[torch.device, list[int]]]:
    """Return the indices of the tensors with elements, for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    return [(device, indices) for (device, _), indices in groups.items()]


def _check_count(name: str, values: Sequence[float]) -> list[float]:
    if not 1 <= len(values) <= MAX_ROWS:
        raise ValueError(f"{name} has {len(values)} values: give 1 to {MAX_ROWS}")
    return [float(value) for value in values]


def _describe(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype} {list(shape)} on {device}"


def _check_tensors(count: int, flat: dict[str, Sequence[Tensor]], stacked: dict[str, Sequence[Tensor]]) -> None:
    """Check that all lists are alike: those in ``stacked`` with ``count`` rows, those in ``flat`` without."""
    lists = {**flat, **stacked}
    model_name, model = next(iter(lists.items()))
    kinds = [
        (tensor.shape if model_name in flat else tensor.shape[1:], tensor.dtype, tensor.device) for tensor in model
    ]
    rows = [((count, *shape), dtype, device) for shape, dtype, device in kinds] if stacked else []
    for name, tensors in lists.items():
        if len(tensors) != len(model):
            raise ValueError(f"{name} has {len(tensors)} tensors and {model_name} {len(model)}: give one for each")
        expected = rows if name in stacked else kinds
        found = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        if found == expected:
            continue
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            if one != other:
                raise ValueError(
                    f"{name}[{index}] is {_describe(*one)}: expected {_describe(*other)}, "
                    f"like {model_name}[{index}]"
                )
    for index, tensor in enumerate(model):
        if not tensor.is_floating_point():
            raise TypeError(
                f"{model_name}[{index}] is {tensor.dtype}: only real floating-point tensors can be scaled"
            )
