"""A linear layer at N candidates in one Triton kernel, which forms their weights as it loads what they are made of.

``now`` and ``direction`` are read, N sets of weights are never written: a third of the traffic of writing them
first, and one launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["DTYPES", "candidate_linear"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_BLOCK_ROWS, _BLOCK_OUT, _BLOCK_IN = 64, 64, 32


def candidate_linear(x: Tensor, now: Tensor, direction: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x[n] @ (now + c[n] * direction).T + bias[n]`` for every n.

    Weights are formed in float32 and rounded to the dtype of ``x``; products are added up in float32, of TF32
    numbers where ``torch.backends.cuda.matmul.allow_tf32`` is set.

    Args:
        x: [N, R, in], of a dtype in :data:`DTYPES`, on a GPU.
        now: [out, in], of any strides.
        direction: a tensor like it.
        c: [N].
        bias: [N, out], or none.

    Returns:
        [N, R, out].
    """
    candidates, rows, width = x.shape
    outputs = len(now)
    x, c = x.contiguous(), c.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((candidates, rows, outputs), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, _BLOCK_ROWS) * triton.cdiv(outputs, _BLOCK_OUT), candidates)
    _linear_kernel[grid](
        x,
        now,
        direction,
        c,
        c if bias is None else bias,
        out,
        rows,
        width,
        outputs,
        *now.stride(),
        *direction.stride(),
        has_bias=bias is not None,
        precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        block_rows=_BLOCK_ROWS,
        block_out=_BLOCK_OUT,
        block_in=_BLOCK_IN,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return out


@triton.jit
def _linear_kernel(
    x,
    now,
    direction,
    c,
    bias,
    out,
    rows,
    width,
    outputs,
    now_stride_out,
    now_stride_in,
    direction_stride_out,
    direction_stride_in,
    has_bias: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
):
    candidate = tl.program_id(1).to(tl.int64)
    # Neighbouring programs share a tile of weights.
    tiles = tl.cdiv(rows, block_rows)
    r = (tl.program_id(0) % tiles) * block_rows + tl.arange(0, block_rows)
    o = (tl.program_id(0) // tiles).to(tl.int64) * block_out + tl.arange(0, block_out)
    k = tl.arange(0, block_in)
    coefficient = tl.load(c + candidate)
    total = tl.zeros((block_rows, block_out), dtype=tl.float32)
    for first in range(0, width, block_in):
        inside = first + k < width
        mask = (r < rows)[:, None] & inside[None, :]
        inputs = tl.load(x + (candidate * rows + r[:, None]) * width + first + k[None, :], mask=mask, other=0.0)
        mask = inside[:, None] & (o < outputs)[None, :]
        place = (first + k)[:, None] * now_stride_in + o[None, :] * now_stride_out
        base = tl.load(now + place, mask=mask, other=0.0).to(tl.float32)
        place = (first + k)[:, None] * direction_stride_in + o[None, :] * direction_stride_out
        step = tl.load(direction + place, mask=mask, other=0.0).to(tl.float32)
        weights = (base + coefficient * step).to(inputs.dtype)
        if _IS_INTERPRETED:  # where dot takes the bits of a bfloat16 for a whole number
            inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(inputs, weights, total, input_precision=precision)
    if has_bias:
        added = tl.load(bias + candidate * outputs + o, mask=o < outputs, other=0.0)
        total += added.to(tl.float32)[None, :]
    mask = (r < rows)[:, None] & (o < outputs)[None, :]
    tl.store(
        out + (candidate * rows + r[:, None]) * outputs + o[None, :], total.to(out.dtype.element_ty), mask=mask
    )
