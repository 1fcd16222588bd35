"""Optimizers of K stacked models, each with a learning rate of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["StackedAdam", "StackedOptimizer", "StackedSGD", "make_optimizer"]


class StackedOptimizer(ABC):
    """A rule that takes one step of K models at once.

    Its state is a list of tensors ``[K, *shape]`` for each name in :attr:`buffers`, one for each parameter, and for
    each parameter the number of steps that it took.

    Attributes:
        buffers: what it keeps of each parameter.
    """

    buffers: tuple[str, ...] = ()

    @abstractmethod
    def step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Sequence[Sequence[Tensor]],
        taken: int,
        lrs: Sequence[float],
    ) -> None:
        """Update parameters and state in place.

        Args:
            params: P tensors ``[K, *shape]`` that took as many steps.
            grads: P tensors like them.
            state: for each of :attr:`buffers` P tensors like them.
            taken: steps taken before this one.
            lrs: K learning rates.
        """


class StackedSGD(StackedOptimizer):
    """:class:`torch.optim.SGD`, by :func:`autolr_fast.ops.stacked_sgd_step`; arguments as there.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self, momentum: float = 0.0, weight_decay: float = 0.0, dampening: float = 0.0, nesterov: bool = False
    ):
        _check_not_negative(momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0.0 or dampening != 0.0):
            raise ValueError(f"nesterov=True needs a momentum and dampening=0: {momentum=}, {dampening=}")
        self._momentum, self._weight_decay = momentum, weight_decay
        self._dampening, self._nesterov = dampening, nesterov
        self.buffers = ("momentum_buffer",) if momentum else ()

    def step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Sequence[Sequence[Tensor]],
        taken: int,
        lrs: Sequence[float],
    ) -> None:
        """Take a step; see :meth:`StackedOptimizer.step`."""
        models = len(lrs)
        ops.stacked_sgd_step(
            params,
            grads,
            state[0] if state else (),
            lr=lrs,
            momentum=[self._momentum] * models,
            weight_decay=[self._weight_decay] * models,
            dampening=[self._dampening] * models,
            nesterov=[self._nesterov] * models,
            first_step=taken == 0,
        )


class StackedAdam(StackedOptimizer):
    """:class:`torch.optim.Adam`, or :class:`torch.optim.AdamW` if weight decay is decoupled; arguments as there.

    Raises:
        ValueError: if an argument is out of its range.
    """

    buffers = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ):
        _check_not_negative(weight_decay=weight_decay, eps=eps)
        if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas)):
            raise ValueError(f"betas={betas!r}: give two numbers, 0 or more and below 1")
        self._betas, self._eps = betas, eps
        self._weight_decay, self._decoupled = weight_decay, decoupled

    def step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Sequence[Sequence[Tensor]],
        taken: int,
        lrs: Sequence[float],
    ) -> None:
        """Take a step; see :meth:`StackedOptimizer.step`."""
        beta1, beta2 = self._betas
        unbiased1, unbiased2 = (1.0 - beta ** (taken + 1) for beta in self._betas)
        rates = torch.tensor(lrs, dtype=torch.float64)
        for param, gradient, mean, square in zip(params, grads, *state, strict=True):
            grad = gradient
            lr = rates.to(param.device, param.dtype).view(-1, *[1] * (param.dim() - 1))
            if self._decoupled:
                param.mul_(1.0 - lr * self._weight_decay)
            elif self._weight_decay:
                grad = gradient.add(param, alpha=self._weight_decay)
            mean.lerp_(grad, 1.0 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            root = (square / unbiased2).sqrt_().add_(self._eps)
            param.sub_(lr / unbiased1 * mean / root)


def make_optimizer(name: str, sgd: dict[str, Any], adam: dict[str, Any], weight_decay: float) -> StackedOptimizer:
    """Return the optimizer of that name, with those of the arguments that are its own.

    Raises:
        ValueError: if there is none of that name, or an argument is another's or out of its range.
    """
    if name == "sgd":
        return StackedSGD(weight_decay=weight_decay, **sgd)
    if name not in ("adam", "adamw"):
        raise ValueError(f"optimizer={name!r} is not known: use one of 'sgd', 'adam', 'adamw'")
    if given := [f"{setting}={value!r}" for setting, value in sgd.items() if value]:
        raise ValueError(f"{given[0]} is an argument of SGD, and optimizer={name!r}: leave it out, or use 'sgd'")
    return StackedAdam(weight_decay=weight_decay, decoupled=name == "adamw", **adam)


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and value >= 0.0):
            raise ValueError(f"{name}={value!r}: give a number, 0 or more")
