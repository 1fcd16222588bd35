"""Layers at one candidate ``now + c * direction`` of their parameters, or at a batch of them.

``torch.library`` operators ``autolr_fast::folded_*``; what they do for N candidates is their vmap rule. Of linear
layers and convolutions:

- The input is the same for all candidates: twice the operation, ``op(x, now)`` and ``op(x, direction)``.
- The inputs differ, and each has few rows: the same, with N times as many rows. No weights are made.
- The inputs differ, and have many rows: twice the operations would cost more than the weights of N candidates,
  which are made for this operation alone; on a GPU, for a linear layer, in registers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEW_ROWS", "batch_norm", "convolution", "linear"]

FEW_ROWS = 32
"""Up to as many rows a candidate, doubling the operations costs less than writing and reading weights."""

torch.library.define(
    "autolr_fast::folded_linear",
    "(Tensor x, Tensor c, Tensor now, Tensor direction, Tensor? bias, Tensor? bias_direction) -> Tensor",
)
torch.library.define(
    "autolr_fast::folded_convolution",
    "(Tensor x, Tensor c, Tensor now, Tensor direction, Tensor? bias, Tensor? bias_direction, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
)
torch.library.define(
    "autolr_fast::folded_batch_norm",
    "(Tensor x, Tensor c, Tensor? now, Tensor? direction, Tensor? bias, Tensor? bias_direction, "
    "float eps) -> Tensor",
)
linear = torch.ops.autolr_fast.folded_linear.default
"""``F.linear`` of x [*, in] with now, direction [out, in], bias, bias_direction [out], c []; returns [*, out]."""
convolution = torch.ops.autolr_fast.folded_convolution.default
"""``F.conv1d``, ``2d`` or ``3d`` of x [B, in, *] with weights [out, in / groups, *]; the rest as in ``linear``."""
batch_norm = torch.ops.autolr_fast.folded_batch_norm.default
"""``F.batch_norm`` by the statistics of x [B, C, *] itself, with weights and biases [C]."""


def _linear(
    x: Tensor, c: Tensor, now: Tensor, direction: Tensor, bias: Tensor | None, bias_direction: Tensor | None
) -> Tensor:
    return F.linear(x, now + c * direction, _at(bias, bias_direction, c))


def _convolution(
    x: Tensor,
    c: Tensor,
    now: Tensor,
    direction: Tensor,
    bias: Tensor | None,
    bias_direction: Tensor | None,
    *rest: Any,
) -> Tensor:
    return _convolve(x, now + c * direction, _at(bias, bias_direction, c), *rest)


def _batch_norm(
    x: Tensor,
    c: Tensor,
    now: Tensor | None,
    direction: Tensor | None,
    bias: Tensor | None,
    bias_direction: Tensor | None,
    eps: float,
) -> Tensor:
    return F.batch_norm(x, None, None, _at(now, direction, c), _at(bias, bias_direction, c), True, 0.0, eps)


for _name, _one in (("linear", _linear), ("convolution", _convolution), ("batch_norm", _batch_norm)):
    torch.library.impl(f"autolr_fast::folded_{_name}", "CompositeExplicitAutograd", _one)


@torch.library.register_vmap("autolr_fast::folded_linear")  # type: ignore[untyped-decorator]
def _batched_linear(
    info: Any,
    in_dims: Sequence[int | None],
    x: Tensor,
    c: Tensor,
    now: Tensor,
    direction: Tensor,
    bias: Tensor | None,
    bias_direction: Tensor | None,
) -> tuple[Tensor, int]:
    if in_dims[0] is None:
        return _sum(F.linear(x, now, bias), F.linear(x, direction, bias_direction), c), 0
    x = x.movedim(in_dims[0], 0)
    rows = x.reshape(len(x), -1, x.shape[-1])  # [N, R, in]
    if rows.shape[1] <= FEW_ROWS:
        step = F.linear(rows, direction, bias_direction)
        out = torch.addcmul(F.linear(rows, now, bias), step, c.view(-1, 1, 1))
    else:
        biases = bias  # [N, out]
        if bias is not None:
            biases = bias.expand(len(x), -1) if bias_direction is None else _sum(bias, bias_direction, c)
        out = _linear_of_each(rows, now, direction, c, biases)
    return out.view(*x.shape[:-1], -1), 0


def _linear_of_each(rows: Tensor, now: Tensor, direction: Tensor, c: Tensor, biases: Tensor | None) -> Tensor:
    if rows.is_cuda and rows.dtype == now.dtype and importlib.util.find_spec("triton") is not None:
        from ..ops import triton_linear  # noqa: PLC0415, where there is no GPU there may be no Triton

        if rows.dtype in triton_linear.DTYPES:
            return triton_linear.candidate_linear(rows, now, direction, c, biases)
    weights = torch.addcmul(now, direction, c.view(-1, 1, 1)).transpose(1, 2)  # [N, in, out]
    if biases is None:
        return torch.bmm(rows, weights)
    return torch.baddbmm(biases.unsqueeze(1), rows, weights)


@torch.library.register_vmap("autolr_fast::folded_convolution")  # type: ignore[untyped-decorator]
def _batched_convolution(
    info: Any,
    in_dims: Sequence[int | None],
    x: Tensor,
    c: Tensor,
    now: Tensor,
    direction: Tensor,
    bias: Tensor | None,
    bias_direction: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, int]:
    if in_dims[0] is None:
        return _sum(_convolve(x, now, bias, *rest), _convolve(x, direction, bias_direction, *rest), c), 0
    # N dense convolutions: one over N groups has slow kernels on every device.
    weights, biases = _sum(now, direction, c).unbind(0), _rows(bias, bias_direction, c)
    out = [
        _convolve(one, weight, own_bias, *rest)
        for one, weight, own_bias in zip(x.unbind(in_dims[0]), weights, biases, strict=True)
    ]
    return torch.stack(out), 0


@torch.library.register_vmap("autolr_fast::folded_batch_norm")  # type: ignore[untyped-decorator]
def _batched_batch_norm(
    info: Any,
    in_dims: Sequence[int | None],
    x: Tensor,
    c: Tensor,
    now: Tensor | None,
    direction: Tensor | None,
    bias: Tensor | None,
    bias_direction: Tensor | None,
    eps: float,
) -> tuple[Tensor, int]:
    inputs = (x,) * info.batch_size if in_dims[0] is None else x.unbind(in_dims[0])
    # One call each: over N times as many channels, the batch would have to move inside of them.
    weights, biases = _rows(now, direction, c), _rows(bias, bias_direction, c)
    out = [
        F.batch_norm(one, None, None, weight, own_bias, True, 0.0, eps)
        for one, weight, own_bias in zip(inputs, weights, biases, strict=True)
    ]
    return torch.stack(out), 0


def _sum(now: Tensor, step: Tensor, c: Tensor) -> Tensor:
    """Return ``now + c * step`` for every c, [N, *shape]."""
    return torch.addcmul(now, step, c.view(-1, *[1] * now.dim()))


def _rows(now: Tensor | None, direction: Tensor | None, c: Tensor) -> Sequence[Tensor | None]:
    """Return ``now + c * direction`` for every c, one by one."""
    if now is None or direction is None:
        return [now] * len(c)
    return _sum(now, direction, c).unbind(0)


def _at(now: Tensor | None, direction: Tensor | None, c: Tensor) -> Tensor | None:
    return now if now is None or direction is None else torch.addcmul(now, direction, c)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
