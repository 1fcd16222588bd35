"""Optimizers of K stacked models, each with a learning rate of its own: rules that take one step of all at once.

Their ``buffers`` name what they keep of each parameter. Options are those of torch; one that is out of its range is
a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._arguments import is_number

__all__ = ["StackedAdam", "StackedAdamW", "StackedOptimizer", "StackedSGD", "make_optimizer"]

_MOST_ELEMENTS, _MOST_ELEMENTS_ON_GPU = 2**19, 2**24
"""Elements updated at once: scratch that stays in a CPU's caches, and that is worth a GPU's launch."""

_Tensors = Sequence[Tensor]


def make_optimizer(name: str, options: Mapping[str, Any] | None) -> StackedOptimizer:
    """Return the optimizer of that name.

    Raises:
        TypeError: if the options are no dict.
        ValueError: if there is none of that name, or an option is not its own or out of its range.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not known: use one of {', '.join(map(repr, _OPTIMIZERS))}")
    if not isinstance(options, Mapping | None):
        raise TypeError(f"optimizer_options={options!r}: expected a dict, such as {{'weight_decay': 0.1}}, or None")
    kind = _OPTIMIZERS[name]
    known = [field.name for field in fields(kind)]
    for option, value in (options or {}).items():
        if option not in known:
            raise ValueError(
                f"optimizer_options has {option!r}, which optimizer={name!r} does not know: give any of "
                f"{', '.join(map(repr, known))}"
            )
        if option != "betas" and not isinstance(value, Real):
            raise ValueError(f"optimizer_options has {option}={value!r}: give a number")
        if option in ("momentum", "weight_decay", "eps") and not value >= 0.0:
            raise ValueError(f"optimizer_options has {option}={value!r}: give a number, 0 or more")
    plain: dict[str, Any] = {
        name: float(value) if is_number(value) else value for name, value in (options or {}).items()
    }
    return kind(**plain)


@dataclass
class StackedSGD:
    """:class:`torch.optim.SGD`."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise ValueError(
                f"nesterov=True needs a momentum and dampening=0: momentum={self.momentum!r}, "
                f"dampening={self.dampening!r}"
            )
        self.buffers = ("momentum_buffer",) if self.momentum else ()

    def step(
        self, params: _Tensors, grads: _Tensors, state: Sequence[_Tensors], taken: int, lrs: Sequence[float]
    ) -> None:
        """Update parameters and state in place.

        Args:
            params: P tensors ``[K, *shape]`` that took as many steps.
            grads: P tensors like them.
            state: for each of ``buffers`` P tensors like them.
            taken: steps taken before this one.
            lrs: K learning rates.
        """
        for part, models in _parts(params):
            narrow = [[tensor[models] for tensor in tensors[part]] for tensors in (params, grads, *state)]
            # Half types are computed in float32 and rounded once; of others these are the very tensors.
            values, directions, *buffers = ([_widened(tensor) for tensor in tensors] for tensors in narrow)
            # Products are rounded before they are added: an addcmul would fuse both where the machine can.
            if self.weight_decay:
                directions = _sum_of_scaled(values, self.weight_decay, directions)
            for buffer in buffers:
                if taken:
                    torch._foreach_mul_(buffer, self.momentum)
                    damped = self.dampening != 0.0
                    kept = torch._foreach_mul(directions, 1.0 - self.dampening) if damped else directions
                    torch._foreach_add_(buffer, kept)
                else:
                    torch._foreach_copy_(buffer, directions)
                directions = _sum_of_scaled(buffer, self.momentum, directions) if self.nesterov else buffer
            torch._foreach_sub_(values, torch._foreach_mul(directions, list(_rates(lrs[models], values))))
            for tensors, results in zip((narrow[0], *narrow[2:]), (values, *buffers), strict=True):
                for tensor, result in zip(tensors, results, strict=True):
                    if tensor is not result:
                        tensor.copy_(result)


@dataclass
class StackedAdam:
    """:class:`torch.optim.Adam`."""

    buffers = ("exp_avg", "exp_avg_sq")
    decoupled: ClassVar[bool] = False

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        betas: object = self.betas
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas)):
            raise ValueError(f"betas={betas!r}: give two numbers, 0 or more and below 1")

    def step(
        self, params: _Tensors, grads: _Tensors, state: Sequence[_Tensors], taken: int, lrs: Sequence[float]
    ) -> None:
        """See :meth:`StackedSGD.step`."""
        beta1, beta2 = self.betas
        unbiased1, unbiased2 = (1.0 - beta ** (taken + 1) for beta in self.betas)
        for param, gradient, mean, square, lr in zip(params, grads, *state, _rates(lrs, params), strict=True):
            grad = gradient
            if self.decoupled:
                param.mul_(1.0 - lr * self.weight_decay)
            elif self.weight_decay:
                grad = gradient.add(param, alpha=self.weight_decay)
            mean.lerp_(grad, 1.0 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            root = (square / unbiased2).sqrt_().add_(self.eps)
            param.sub_(lr / unbiased1 * mean / root)


class StackedAdamW(StackedAdam):
    """:class:`torch.optim.AdamW`."""

    decoupled = True


StackedOptimizer = StackedSGD | StackedAdam

_OPTIMIZERS: Mapping[str, type[StackedOptimizer]] = {
    "sgd": StackedSGD,
    "adam": StackedAdam,
    "adamw": StackedAdamW,
}


def _parts(params: Sequence[Tensor]) -> Iterator[tuple[slice, slice]]:
    """Yield parameters and models to update at once: of a large parameter some models, else all."""
    most = _MOST_ELEMENTS if params[0].device.type == "cpu" else _MOST_ELEMENTS_ON_GPU
    start = 0
    while start < len(params):
        stop, elements = start + 1, params[start].numel()
        while stop < len(params) and elements + params[stop].numel() <= most:
            elements += params[stop].numel()
            stop += 1
        together = max(1, len(params[start]) * most // max(1, elements))
        for first in range(0, len(params[start]), together):
            yield slice(start, stop), slice(first, first + together)
        start = stop


def _rates(lrs: Sequence[float], params: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the rates ``[K, 1, ...]`` of each tensor ``[K, *shape]``, copied once to each device and dtype."""
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for param in params:
        kind = param.device, param.dtype
        if kind not in copies:
            copies[kind] = torch.tensor(lrs, dtype=torch.float64).to(*kind)
        yield copies[kind].view(-1, *[1] * (param.dim() - 1))


def _sum_of_scaled(tensors: list[Tensor], scale: float, others: list[Tensor]) -> list[Tensor]:
    """Return ``scale * tensor + other`` of each pair."""
    sums = list(torch._foreach_mul(tensors, scale))
    torch._foreach_add_(sums, others)
    return sums


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
