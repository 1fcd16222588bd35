"""The backend ``triton``: the operators as Triton kernels, one launch a call, on a GPU without any compiler.

The formulas are those of :mod:`autolr_fast._ops.plain`, rounded operation by operation, and give the same
bits. With TRITON_INTERPRET=1 set before the import the kernels run in Triton's interpreter, on CPU tensors: slow,
to look into them and to test them without a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .buffer import are_alike
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


class _Call(NamedTuple):
    """What does not depend on the factors; what a plan holds.

    Attributes:
        block: elements of a program.
        stream: that the tables are uploaded on.
        has_lr: 1 or 0.
        owners: see :func:`_layout`.
        sizes: see :func:`_layout`.
        places: [3 * P + 1] int64, the addresses of the tensors in the order of the operator, and of lr.
    """

    block: int
    stream: int
    has_lr: int
    owners: Tensor
    sizes: Tensor
    places: Tensor


def _stack_candidates(
    prev: Sequence[Tensor], now: Sequence[Tensor], factors: Sequence[float], out: Sequence[Tensor]
) -> None:
    if any(tensor.numel() for tensor in prev):
        _launch(_prepare(prev, now, None, out), factors, out[0])


def _stack_gradient_candidates(
    now: Sequence[Tensor], grad: Sequence[Tensor], lr: Tensor, factors: Sequence[float], out: Sequence[Tensor]
) -> None:
    if any(tensor.numel() for tensor in now):
        rates = lr.contiguous()  # lives until the kernel is launched: what takes its memory next comes after
        _launch(_prepare(now, grad, rates, out), factors, out[0])


def _plan(
    first: Sequence[Tensor], second: Sequence[Tensor], lr: Tensor | None, out: Sequence[Tensor]
) -> list[Tensor]:
    if not are_alike(first, second, out) or not any(tensor.numel() for tensor in first):
        return []
    *head, owners, sizes, places = _prepare(first, second, lr, out)
    # The caches may hand out the same tables again, and a result of an operator must be nobody else's.
    return [torch.tensor(head, device="cpu"), *(table.view_as(table) for table in (owners, sizes, places))]


def _write(plan: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    head, *tables = plan
    _launch(_Call(*head.tolist(), *tables), factors, out)


def _prepare(first: Sequence[Tensor], second: Sequence[Tensor], lr: Tensor | None, out: Sequence[Tensor]) -> _Call:
    device = out[0].device
    numels = tuple(tensor.numel() for tensor in first)
    # Eight elements a thread. A small model is cut finer, or it would leave most of the GPU idle.
    block = 1024 if sum(numels) >= 2**19 else 256
    addresses = [tensor.data_ptr() for group in (first, second, out) for tensor in group]
    addresses.append(0 if lr is None else lr.data_ptr())
    with torch.cuda.device_of(out[0]):
        stream = _current_stream(device)
        owners, sizes = _layout(numels, block, device, stream)
        places = _table(tuple(addresses), device, stream)
    return _Call(block, stream, int(lr is not None), owners, sizes, places)


def _launch(call: _Call, factors: Sequence[float], out: Tensor) -> None:
    """Run the kernel over all tensors."""
    device, has_lr = out.device, bool(call.has_lr)
    with torch.cuda.device_of(out):  # where Triton launches
        stream = _current_stream(device)
        if stream != call.stream:
            raise RuntimeError("a plan of autolr_fast's backend 'triton' serves the stream that it was made on")
        scales = _scales(tuple(factors), has_lr, out.dtype, device, stream)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.extend((call.owners, call.sizes, call.places, scales))
        _rows_kernel[len(call.owners),](
            *(call.owners, call.sizes, call.places, call.sizes.shape[1], scales, len(factors)),
            has_lr=has_lr,
            dtype=_DTYPES[out.dtype],
            block=call.block,
            num_warps=call.block // 256,
            enable_fp_fusion=False,
        )


def _current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


# A table is a function of its key alone, and holds nothing but numbers: it keeps no tensor alive, and is right
# for whichever tensors lie at its addresses. With the stream in the key it is written, read and, once it is
# dropped from the cache, written over by the allocator in the order of that one stream.
@functools.lru_cache(maxsize=32)
def _table(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _upload(torch.tensor(values, dtype=torch.int64, device="cpu"), device)


@functools.lru_cache(maxsize=32)
def _scales(
    factors: tuple[float, ...], has_lr: bool, stored: torch.dtype, device: torch.device, stream: int
) -> Tensor:
    """Return [2, rows]: is the base the first input?, coefficient."""
    if has_lr:  # the product with lr, which only the device knows, is one of float64 whatever the dtype
        wide, from_first = torch.float64, [True] * len(factors)
        coefficients = [-factor for factor in factors]
    else:  # the end that is nearer is the base, as in torch.lerp
        wide, from_first = torch.promote_types(stored, torch.float32), [abs(factor) < 0.5 for factor in factors]
        coefficients = [f if near else f - 1.0 for f, near in zip(factors, from_first, strict=True)]
    return _upload(torch.tensor([*from_first, *coefficients], dtype=wide, device="cpu"), device)


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


# Kernels. owners, sizes: see _layout. places: see _Call.


@triton.jit(do_not_specialize=["count", "rows"])
def _rows_kernel(
    owners, sizes, places, count, table, rows, has_lr: tl.constexpr, dtype: tl.constexpr, block: tl.constexpr
):
    """first_i, second_i [numel_i], lr [count] if there is one -> out_i [rows, numel_i]; table: the scales."""
    program = tl.program_id(0)
    index = tl.load(owners + program).to(tl.int64)
    numel, first_program = tl.load(sizes + index), tl.load(sizes + count + index)
    start = (program - first_program) * block
    place = places + index
    first, second, out = tl.load(place), tl.load(place + count), tl.load(place + 2 * count)
    rate = tl.load(tl.load(places + 3 * count).to(tl.pointer_type(tl.float64)) + index) if has_lr else None
    if _is_aligned(first | second | out, numel, dtype):
        _write_rows(first, second, out, numel, start, table, rows, rate, dtype, block, True)
    else:
        _write_rows(first, second, out, numel, start, table, rows, rate, dtype, block, False)


@triton.jit
def _write_rows(
    first, second, out, numel, start, table, rows, rate,
    dtype: tl.constexpr, block: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    numel, offsets, mask = _block(numel, start, dtype, block, aligned)
    before = _load(first, offsets, mask, dtype, aligned)
    after = _load(second, offsets, mask, dtype, aligned)
    step = after if rate is not None else after - before
    for row in range(rows):
        coefficient = tl.load(table + rows + row)
        if rate is not None:
            coefficient = (coefficient * rate).to(before.dtype)
        base = tl.where(tl.load(table + row) != 0, before, after)
        # With a coefficient of 0 the base, also where the step is not finite.
        value = tl.where(coefficient == 0, base, step * coefficient + base)
        _store(out, row * numel + offsets, value, mask, dtype, aligned)


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


for _name, _function in {
    "stack_candidates": _stack_candidates,
    "stack_gradient_candidates": _stack_gradient_candidates,
    "write": _write,
}.items():
    LIBRARY.impl(f"{_name}.triton", _function, "CUDA")  # type: ignore[no-untyped-call]
    if _IS_INTERPRETED.value:
        LIBRARY.impl(f"{_name}.triton", _function, "CPU")  # type: ignore[no-untyped-call]
LIBRARY.impl("plan.triton", _plan, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
