"""Layers of stacked models whose rule in ``torch.vmap`` does more than it has to, or fails on a GPU.

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

__all__ = ["FusedLayers", "attention", "batch_norm", "dropout_mask", "linear"]

torch.library.define("autolr_fast::stacked_linear", "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor")
torch.library.define(
    "autolr_fast::stacked_batch_norm",
    "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight=None, Tensor? bias=None, "
    "bool training=False, float momentum=0.1, float eps=1e-5) -> Tensor",
)
torch.library.define("autolr_fast::stacked_dropout_mask", "(Tensor like, float p) -> Tensor")
torch.library.define(
    "autolr_fast::stacked_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, "
    "*, float? scale=None, bool enable_gqa=False) -> Tensor",
)

torch.library.impl("autolr_fast::stacked_linear", "CompositeImplicitAutograd", F.linear)
torch.library.impl("autolr_fast::stacked_batch_norm", "CompositeImplicitAutograd", F.batch_norm)
# Inside of vmap, also in a rule, torch's random operations go by rules of their own; a kernel runs outside.
torch.library.impl(
    "autolr_fast::stacked_dropout_mask",
    "CompositeExplicitAutograd",
    lambda like, p: F.dropout(torch.ones_like(like), p),
)
torch.library.impl("autolr_fast::stacked_attention", "CompositeExplicitAutograd", F.scaled_dot_product_attention)

linear = torch.ops.autolr_fast.stacked_linear.default
"""``F.linear`` of x [*, in], weight [out, in] and bias [out]."""
batch_norm = torch.ops.autolr_fast.stacked_batch_norm.default
"""``F.batch_norm`` of x [B, C, *] with statistics, weight and bias [C]."""
dropout_mask = torch.ops.autolr_fast.stacked_dropout_mask.default
"""What ``F.dropout`` in train mode multiplies a tensor [*] by; takes it without its gradient."""
attention = torch.ops.autolr_fast.stacked_attention.default
"""``F.scaled_dot_product_attention`` of query, key and value [*, T, E], without gradients."""


@torch.library.register_vmap("autolr_fast::stacked_linear")  # type: ignore[untyped-decorator]
def _batched_linear(
    info: Any, in_dims: Sequence[int | None], x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, int]:
    """One batched product from the left: from the right, the weights' gradients would come transposed."""
    models = info.batch_size
    x, weight = _for_each(models, x, in_dims[0]), _for_each(models, weight, in_dims[1])
    shape = [*x.shape[:-1], *weight.shape[1:-1]]
    rows = x.reshape(models, -1, x.shape[-1]).mT  # [N, in, R]
    weight = weight.reshape(models, -1, weight.shape[-1])  # [N, out, in]
    if bias is None:
        out = torch.bmm(weight, rows)
    else:
        out = torch.baddbmm(_for_each(models, bias, in_dims[2]).unsqueeze(-1), weight, rows)
    return out.mT.reshape(shape), 0


def _for_each(models: int, value: Tensor, dim: int | None) -> Tensor:
    """Return a value with N models as its first dimension."""
    return value.expand(models, *value.shape) if dim is None else value.movedim(dim, 0)


@torch.library.register_vmap("autolr_fast::stacked_batch_norm")  # type: ignore[untyped-decorator]
def _batched_batch_norm(info: Any, in_dims: Sequence[int | None], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """One layer over N times as many channels: torch's rule leaves weight and bias to operations of their own."""
    models = info.batch_size
    # Dimension 1 is where a grouped convolution leaves the models.
    x = x.unsqueeze(1).expand(-1, models, *x.shape[1:]) if in_dims[0] is None else x.movedim(in_dims[0], 1)
    # In the same memory, if what the models have of their own lies side by side.
    flat = [
        _for_each(models, value, dim).reshape(-1) if isinstance(value, Tensor) else value
        for value, dim in zip(rest, in_dims[1:], strict=True)
    ]
    out: Tensor = batch_norm(x.flatten(1, 2), *flat)
    return out.view(x.shape), 1


@torch.library.register_vmap("autolr_fast::stacked_dropout_mask")  # type: ignore[untyped-decorator]
def _batched_dropout_mask(
    info: Any, in_dims: Sequence[int | None], like: Tensor, p: float
) -> tuple[Tensor, int | None]:
    """One for all models, drawn as a model alone draws it: on a GPU, torch's rule for dropout draws another."""
    _check_randomness(info)
    like = _for_each(info.batch_size, like, in_dims[0])
    if info.randomness == "different":
        return dropout_mask(like, p), 0
    like = like[0]
    if like.dim() > 1 and like.flatten(0, -2).mT.is_contiguous():
        like = like.contiguous()  # the rule for linear layers leaves it transposed, the layer does not
    return dropout_mask(like, p), None


def _check_randomness(info: Any) -> None:
    if info.randomness == "error":
        raise RuntimeError("vmap: dropout draws random numbers: pass randomness='same' or 'different'")


@torch.library.register_vmap("autolr_fast::stacked_attention")  # type: ignore[untyped-decorator]
def _batched_attention(
    info: Any,
    in_dims: Sequence[int | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, int]:
    """One batch, N times as large: on a GPU, torch's rule gives its kernels shapes that they do not take.

    With dropout one model after another, each with the same random numbers: the kernels draw by position.
    """
    models = info.batch_size
    # [N, B, *, T, E], or [N, T, E]
    inputs = [_for_each(models, x, dim) for x, dim in zip((query, key, value), in_dims[:3], strict=True)]
    if mask is not None:
        mask = _for_each(1, mask, in_dims[3])  # [N or 1, *]
    if dropout_p:
        _check_randomness(info)
        masks = [None] * models if mask is None else mask.expand(models, *mask.shape[1:]).unbind(0)
        devices = [query.device] if query.is_cuda else []
        outs = []
        for index, each in enumerate(zip(*inputs, masks, strict=True)):
            again = info.randomness == "same" and index < models - 1
            with torch.random.fork_rng(devices, enabled=again):
                outs.append(attention(*each, dropout_p, *rest, **options))
        return torch.stack(outs), 0
    if mask is not None:
        missing = inputs[0].dim() - mask.dim()
        mask = mask.reshape(len(mask), *[1] * missing, *mask.shape[1:])  # [N or 1, B or 1, *, T, S]
    if inputs[0].dim() == 3:
        return attention(*inputs, mask, dropout_p, *rest, **options), 0
    if mask is not None:
        batch = inputs[0].shape[1]
        same = mask.shape[:2] == (1, 1)
        mask = mask[0] if same else mask.expand(models, batch, *mask.shape[2:]).flatten(0, 1)
    out: Tensor = attention(*(x.flatten(0, 1) for x in inputs), mask, dropout_p, *rest, **options)
    return out.view(models, -1, *out.shape[1:]), 0


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
        if rule is not None and func not in _UNDER_AUTOCAST:
            autocast = any(isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type) for x in args)
            rule = None if autocast else rule
        return (rule or func)(*args, **(kwargs or {}))


def _call_linear(*args: Any, **kwargs: Any) -> Any:
    rule = linear if torch.is_grad_enabled() else F.linear  # without gradients it is slower
    return rule(*args, **kwargs)


def _call_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p < 1:
        return F.dropout(input, p, training, inplace)
    mask = dropout_mask(input.detach(), p)
    return input.mul_(mask) if inplace else input * mask


def _call_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Any:
    broadcasts = not query.dim() == key.dim() == value.dim() or (
        query.dim() > 2 and not len(query) == len(key) == len(value)
    )
    is_plain = attn_mask is None or (type(attn_mask) is Tensor and attn_mask.dim() <= query.dim())
    inputs: list[Any] = [query, key, value, attn_mask]
    if torch.is_grad_enabled() or broadcasts or not is_plain:
        return F.scaled_dot_product_attention(*inputs, *rest, **options)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        wide = (torch.bool, torch.float64)
        inputs = [x if x is None or x.dtype in wide else x.to(dtype) for x in inputs]
    return attention(*inputs, *rest, **options)


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _call_linear,
    F.batch_norm: batch_norm,
    F.dropout: _call_dropout,
    F.scaled_dot_product_attention: _call_attention,
}
_UNDER_AUTOCAST = (F.dropout, F.scaled_dot_product_attention)
