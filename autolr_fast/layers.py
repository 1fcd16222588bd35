"""Layers of stacked models whose rule in ``torch.vmap`` does more than it has to.

``torch.library`` operators ``autolr_fast::stacked_*``: the layer itself, and a rule for many models. Inside
:class:`FusedLayers` torch functions call them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FusedLayers", "batch_norm", "linear"]

torch.library.define("autolr_fast::stacked_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

torch.library.define(
    "autolr_fast::stacked_batch_norm",
    "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, bool training, "
    "float momentum, float eps) -> Tensor",
)


torch.library.impl("autolr_fast::stacked_linear", "CompositeImplicitAutograd", F.linear)
torch.library.impl("autolr_fast::stacked_batch_norm", "CompositeImplicitAutograd", F.batch_norm)

linear = torch.ops.autolr_fast.stacked_linear.default
"""``F.linear`` of x [*, in], weight [out, in] and bias [out]."""
batch_norm = torch.ops.autolr_fast.stacked_batch_norm.default
"""``F.batch_norm`` of x [B, C, *] with statistics, weight and bias [C]."""


@torch.library.register_vmap("autolr_fast::stacked_linear")  # type: ignore[untyped-decorator]
def _batched_linear(
    info: Any, in_dims: Sequence[int | None], x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, int]:
    """One batched product from the left: from the right, the weights' gradients would come transposed."""
    x, weight = _in_front(x, in_dims[0]), _in_front(weight, in_dims[1])
    shape = [info.batch_size, *x.shape[1:-1], *weight.shape[1:-1]]
    rows = x.reshape(len(x), -1, x.shape[-1])  # [N or 1, R, in]
    weight = weight.reshape(len(weight), -1, weight.shape[-1])  # [N or 1, out, in]
    bias = None if bias is None else _in_front(bias, in_dims[2]).unsqueeze(-1)
    if len(weight) == info.batch_size:
        rows = rows.expand(info.batch_size, -1, -1)
        out = torch.bmm(weight, rows.mT) if bias is None else torch.baddbmm(bias, weight, rows.mT)
    else:
        out = torch.matmul(weight, rows.mT)
        out = out if bias is None else out + bias
    return out.mT.expand(info.batch_size, -1, -1).reshape(shape), 0


def _in_front(value: Tensor, dim: int | None) -> Tensor:
    """Return a value with the models as its first dimension; of length 1, if all have the same."""
    return value.unsqueeze(0) if dim is None else value.movedim(dim, 0)


@torch.library.register_vmap("autolr_fast::stacked_batch_norm")  # type: ignore[untyped-decorator]
def _batched_batch_norm(info: Any, in_dims: Sequence[int | None], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """One layer over N times as many channels: torch's rule leaves weight and bias to operations of their own."""
    models = info.batch_size
    # Dimension 1 is where a grouped convolution leaves the models.
    x = x.unsqueeze(1).expand(-1, models, *x.shape[1:]) if in_dims[0] is None else x.movedim(in_dims[0], 1)
    flat = [_flat(value, dim, models) for value, dim in zip(rest[:4], in_dims[1:5], strict=True)]
    out: Tensor = batch_norm(x.flatten(1, 2), *flat, *rest[4:])
    return out.view(x.shape), 1


def _flat(value: Tensor | None, dim: int | None, models: int) -> Tensor | None:
    """Return values ``[C]`` of each of N models as ``[N * C]``; in the same memory, if they lie side by side."""
    return None if value is None else _in_front(value, dim).expand(models, -1).reshape(-1)


class FusedLayers(TorchFunctionMode):
    """Inside it, layers that have a rule here go by it. Outside of ``vmap`` they are what they were."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func)
        # Autocast chooses dtypes by function, and knows its own.
        if rule is None or any(isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type) for x in args):
            rule = func
        return rule(*args, **(kwargs or {}))


def _call_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return linear(input, weight, bias)


def _call_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: _call_linear, F.batch_norm: _call_batch_norm}
