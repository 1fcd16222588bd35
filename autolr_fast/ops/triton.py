"""The backend ``triton``: the operators as Triton kernels, one launch a call, on a GPU without any compiler.

The formulas are those of :mod:`autolr_fast.ops.plain`, rounded operation by operation, and give the same
bits. With TRITON_INTERPRET=1 set before the import the kernels run in Triton's interpreter, on CPU tensors: slow,
to look into them and to test them without a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .schemas import LIBRARY

__all__: list[str] = []

_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

_DTYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

_captured: list[Tensor] = []
"""Tables that CUDA graphs read whenever they are replayed."""


def _stack_candidates(
    prev: Sequence[Tensor], now: Sequence[Tensor], factors: Sequence[float], out: Sequence[Tensor]
) -> None:
    # The end that is nearer is the base, as in torch.lerp.
    from_prev = [abs(factor) < 0.5 for factor in factors]
    scales = [factor if near else factor - 1.0 for factor, near in zip(factors, from_prev, strict=True)]
    _launch(_candidates_kernel, (prev, now, out), (*from_prev, *scales), len(factors))


def _stack_gradient_candidates(
    now: Sequence[Tensor], grad: Sequence[Tensor], lr: Tensor, factors: Sequence[float], out: Sequence[Tensor]
) -> None:
    # The product with lr, which only the device knows, is one of float64 whatever the dtype.
    scales = [-factor for factor in factors]
    _launch(
        _gradient_candidates_kernel,
        (now, grad, out),
        scales,
        len(factors),
        lr.contiguous(),
        table_dtype=torch.float64,
    )


def _stacked_sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    dampening: Sequence[float],
    nesterov: Sequence[bool],
    first_step: bool,
) -> None:
    settings = (*lr, *momentum, *weight_decay, *(1.0 - value for value in dampening), *nesterov)
    tensors = (params, grads, momentum_buffers or params)  # not touched where there is no momentum
    _launch(_sgd_kernel, tensors, settings, len(lr), models=len(lr), first_step=first_step)


def _score(
    losses: Tensor,
    factors: Sequence[float],
    normalize: str,
    exponent: float,
    lowest: float,
    highest: float,
    level: Tensor,
    weights: Tensor,
    factor: Tensor,
) -> None:
    with _on(losses.device) as stream:
        table = _table(tuple(factors), torch.float64, losses.device, stream)
        _keep_if_captured(table)
        arguments = (losses, table, level, weights, factor, exponent, lowest, highest, len(factors))
        padded = triton.next_power_of_2(len(factors))
        _score_kernel[1,](*arguments, normalize=normalize, padded=padded, num_warps=1, enable_fp_fusion=False)


def _launch(
    kernel: Any,
    tensors: Sequence[Sequence[Tensor]],
    settings: Sequence[float],
    rows: int,
    *arguments: Tensor,
    models: int = 1,
    table_dtype: torch.dtype | None = None,
    **constants: Any,
) -> None:
    """Run a kernel over all tensors; ``settings`` become a table, by default of the type computed in."""
    # With several models a program works within one: numel is that of its row.
    numels = tuple(tensor.numel() // models for tensor in tensors[0])
    if not any(numels):
        return
    device, stored = tensors[0][0].device, tensors[0][0].dtype
    wide = torch.promote_types(stored, torch.float32)
    # Eight elements a thread. A small model is cut finer, or it would leave most of the GPU idle.
    block = 1024 if sum(numels) * models >= 2**19 else 256
    with _on(device) as stream:
        owners, sizes = _layout(numels, block, device, stream)
        addresses = tuple(tensor.data_ptr() for group in tensors for tensor in group)
        places = _table(addresses, torch.int64, device, stream)
        table = _table(tuple(settings), table_dtype or wide, device, stream)
        _keep_if_captured(owners, sizes, places, table)
        kernel[len(owners), models](
            *(owners, sizes, places, len(numels), table, rows, *arguments),
            **{"dtype": _DTYPES[stored], "block": block, **constants},
            num_warps=block // 256,
            enable_fp_fusion=False,
        )


# A table is a function of its key alone, and holds nothing but numbers: it keeps no tensor alive, and is right
# for whichever tensors lie at its addresses. With the stream in the key it is written, read and, once it is
# dropped from the cache, written over by the allocator in the order of that one stream.
@functools.lru_cache(maxsize=32)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return _upload(torch.tensor(values, dtype=dtype, device="cpu"), device)


@functools.lru_cache(maxsize=8)
def _layout(numels: tuple[int, ...], block: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Return each program's tensor [programs] int32, and each tensor's numel and first program [2, P] int64."""
    sizes = torch.tensor(numels, device="cpu")
    programs = (sizes + block - 1) // block
    owners = torch.arange(len(numels), dtype=torch.int32, device="cpu").repeat_interleave(programs)
    return _upload(owners, device), _upload(torch.stack([sizes, programs.cumsum(0) - programs]), device)


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting: pinned memory is reused only once it has been read."""
    if device.type == "cpu":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "autolr_fast's backend 'triton' meets new tensors or numbers while a CUDA graph is captured, and "
            "cannot upload their tables then: run the same call once before, on the stream of the capture"
        )
    return table.pin_memory().to(device, non_blocking=True)


def _keep_if_captured(*tables: Tensor) -> None:
    if tables[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.extend(tables)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[int]:
    """Make the device the current one, where Triton launches; yields the handle of its stream."""
    if device.type == "cpu":
        yield 0
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream().cuda_stream


# Kernels. owners, sizes: see _layout. addresses [3, count] int64, of the tensors in the order of the operator.


@triton.jit(do_not_specialize=["count", "rows"])
def _candidates_kernel(owners, sizes, addresses, count, table, rows, dtype: tl.constexpr, block: tl.constexpr):
    """prev_i, now_i [numel_i] -> out_i [rows, numel_i]; table [2, rows]: is the base prev?, coefficient."""
    index, numel, start = _place(owners, sizes, count, block)
    prev, now, out = _addresses(addresses, index, count)
    if _is_aligned(prev | now | out, numel, dtype):
        _write_candidates(prev, now, out, numel, start, table, rows, dtype, block, True)
    else:
        _write_candidates(prev, now, out, numel, start, table, rows, dtype, block, False)


@triton.jit
def _write_candidates(
    prev, now, out, numel, start, table, rows, dtype: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr
):
    numel, offsets, mask = _block(numel, start, dtype, block, aligned)
    before = _load(prev, offsets, mask, dtype, aligned)
    after = _load(now, offsets, mask, dtype, aligned)
    step = after - before
    for row in range(rows):
        coefficient = tl.load(table + rows + row)
        base = tl.where(tl.load(table + row) != 0, before, after)
        # With a coefficient of 0 the base, also where the step is not finite.
        value = tl.where(coefficient == 0, base, step * coefficient + base)
        _store(out, row * numel + offsets, value, mask, dtype, aligned)


@triton.jit(do_not_specialize=["count", "rows"])
def _gradient_candidates_kernel(
    owners, sizes, addresses, count, table, rows, lr, dtype: tl.constexpr, block: tl.constexpr
):
    """now_i, grad_i [numel_i], lr [count] -> out_i [rows, numel_i]; table [rows] float64: -factor."""
    index, numel, start = _place(owners, sizes, count, block)
    now, grad, out = _addresses(addresses, index, count)
    rate = tl.load(lr + index)
    if _is_aligned(now | grad | out, numel, dtype):
        _write_gradient_candidates(now, grad, out, numel, start, table, rows, rate, dtype, block, True)
    else:
        _write_gradient_candidates(now, grad, out, numel, start, table, rows, rate, dtype, block, False)


@triton.jit
def _write_gradient_candidates(
    now, grad, out, numel, start, table, rows, rate,
    dtype: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    numel, offsets, mask = _block(numel, start, dtype, block, aligned)
    base = _load(now, offsets, mask, dtype, aligned)
    step = _load(grad, offsets, mask, dtype, aligned)
    for row in range(rows):
        coefficient = (tl.load(table + row) * rate).to(base.dtype)
        _store(out, row * numel + offsets, step * coefficient + base, mask, dtype, aligned)


@triton.jit(do_not_specialize=["count", "rows"])
def _sgd_kernel(
    owners, sizes, addresses, count, table, rows,
    dtype: tl.constexpr, block: tl.constexpr, first_step: tl.constexpr,
):  # fmt: skip
    """param_i, grad_i, buffer_i [rows, numel_i]; table [5, rows], see _step. Axis 1 of the grid is the row."""
    index, numel, start = _place(owners, sizes, count, block)
    param, grad, buffer = _addresses(addresses, index, count)
    row = tl.program_id(1)
    offset = row * numel * (dtype.primitive_bitwidth // 8)
    param, grad, buffer = param + offset, grad + offset, buffer + offset
    if _is_aligned(param | grad | buffer, numel, dtype):
        _step(param, grad, buffer, numel, start, table + row, rows, dtype, block, first_step, True)
    else:
        _step(param, grad, buffer, numel, start, table + row, rows, dtype, block, first_step, False)


@triton.jit
def _step(
    param, grad, buffer, numel, start, table, rows,
    dtype: tl.constexpr, block: tl.constexpr, first_step: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    lr, momentum, weight_decay = tl.load(table), tl.load(table + rows), tl.load(table + 2 * rows)
    undamped, nesterov = tl.load(table + 3 * rows), tl.load(table + 4 * rows)
    numel, offsets, mask = _block(numel, start, dtype, block, aligned)
    p = _load(param, offsets, mask, dtype, aligned)
    g = _load(grad, offsets, mask, dtype, aligned)
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    b = g
    kept = tl.where(momentum != 0, mask, False)
    if not first_step:
        b = momentum * _load(buffer, offsets, kept, dtype, aligned) + undamped * g
    _store(buffer, offsets, b, kept, dtype, aligned)
    g = tl.where(momentum != 0, tl.where(nesterov != 0, g + momentum * b, b), g)
    _store(param, offsets, p - lr * g, mask, dtype, aligned)


@triton.jit
def _place(owners, sizes, count, block: tl.constexpr):
    """Return this program's tensor, the numel of it, and where in it the program starts, all int64."""
    index = tl.load(owners + tl.program_id(0)).to(tl.int64)
    first = tl.load(sizes + count + index)
    return index, tl.load(sizes + index), (tl.program_id(0) - first) * block


@triton.jit
def _addresses(addresses, index, count):
    place = addresses + index
    return tl.load(place), tl.load(place + count), tl.load(place + 2 * count)


@triton.jit
def _is_aligned(addresses, numel, dtype: tl.constexpr):
    """Return whether every row begins where 16 bytes can be moved at once, which Triton cannot know by itself."""
    return (addresses | (numel * (dtype.primitive_bitwidth // 8))) % 16 == 0


@triton.jit
def _block(numel, start, dtype: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr):
    if aligned:  # changes nothing, but shows the compiler that a mask is the same for all of a vector
        numel = numel // (128 // dtype.primitive_bitwidth) * (128 // dtype.primitive_bitwidth)
    offsets = start + tl.arange(0, block)
    if not aligned:
        # A column, because all accesses of one shape get one layout, and that for vectors is a bad one here.
        offsets = tl.expand_dims(offsets, 1)
    return numel, offsets, offsets < numel


@triton.jit
def _pointer(address, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(address, offsets, mask, dtype: tl.constexpr, aligned: tl.constexpr):
    """Return the elements in the type that is computed in: float64 for float64, else float32."""
    value = tl.load(_pointer(address, dtype, aligned) + offsets, mask=mask)
    return value.to(tl.float64 if dtype == tl.float64 else tl.float32)


@triton.jit
def _store(address, offsets, value, mask, dtype: tl.constexpr, aligned: tl.constexpr):
    if _IS_INTERPRETED and dtype == tl.bfloat16:  # the interpreter would cut bits off, a GPU rounds to nearest even
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # noqa: PLR0124
        value = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(_pointer(address, dtype, aligned) + offsets, value.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _score_kernel(
    losses, factors, level, weights, factor,
    exponent: tl.float64, lowest: tl.float64, highest: tl.float64,  # else a float is passed as float32
    count, normalize: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """losses, factors [count] -> level 0-dim, weights [count], factor 0-dim: scoring.weigh, all float64."""
    lanes = tl.arange(0, padded)
    real = lanes < count
    # What pads is like a loss that is not finite: it weighs nothing, and is neither the least nor the largest.
    loss = tl.load(losses + lanes, mask=real, other=float("inf"))
    finite = tl.abs(loss) < float("inf")
    x = tl.where(finite, loss, tl.max(tl.where(finite, loss, -float("inf")), 0))
    if normalize == "minmax":
        low = tl.min(x, 0)
        x = (x - low) / _nonzero(tl.max(x, 0) - low)
    elif normalize == "zscore":
        x = x - tl.sum(tl.where(real, x, 0.0), 0) / count
        x = x / _nonzero(tl.sqrt(tl.sum(tl.where(real, x * x, 0.0), 0) / count))
    elif normalize == "sum":
        x = x / _nonzero(tl.sum(tl.where(real, tl.abs(x), 0.0), 0))

    # A nan in x, of an overflow, makes the sum and so all weights nan: the minimum need not.
    raw = tl.where(finite, tl.exp(tl.min(x, 0) - x), 0.0)
    weight = raw / tl.sum(raw, 0)
    spread = tl.load(factors + lanes, mask=real, other=1.0)
    mean = tl.exp(tl.sum(weight * tl.log(spread), 0))

    silent = ~_any(real & (loss != tl.load(losses))) | ~(tl.abs(mean) < float("inf"))
    mean = tl.where(silent, 1.0, mean)
    mean = tl.where(_any(finite), mean, tl.min(tl.where(real, spread, float("inf")), 0))
    tl.store(weights + lanes, tl.where(weight == weight, weight, 0.0), mask=real)  # noqa: PLR0124
    tl.store(factor, mean)

    power = tl.full((), exponent, tl.float64)
    moved = tl.load(level) * tl.where(power == 1.0, mean, tl.exp(power * tl.log(mean)))
    moved = tl.where(moved < lowest, tl.full((), lowest, tl.float64), moved)
    tl.store(level, tl.where(moved > highest, tl.full((), highest, tl.float64), moved))


@triton.jit
def _nonzero(divisor):
    return tl.where(divisor == 0, 1.0, divisor)


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


for _name, _function in {
    "stack_candidates": _stack_candidates,
    "stack_gradient_candidates": _stack_gradient_candidates,
    "stacked_sgd_step": _stacked_sgd_step,
    "score": _score,
}.items():
    LIBRARY.impl(f"{_name}.triton", _function, "CUDA")  # type: ignore[no-untyped-call]
    if _IS_INTERPRETED.value:
        LIBRARY.impl(f"{_name}.triton", _function, "CPU")  # type: ignore[no-untyped-call]
