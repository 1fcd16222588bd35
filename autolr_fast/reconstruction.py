"""The last steps of an optimizer, told from its state: the parameters before them need not be kept."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import ops
from .memory import are_small

__all__ = ["StateLine", "sample", "tells"]

_SAMPLES = 64  # elements of a parameter that are kept to compare with
_TOLERANCE = 1e-3  # of a step


def tells(optimizer: Optimizer, window: int) -> bool:
    """Whether gradients and state tell what the last ``window`` steps changed.

    So it is for SGD's last step, and last two with momentum (not Nesterov's, which needs the gradient before), and
    for the last one of Adam and AdamW (not AMSGrad; an element's first gradient cancels out of the second moment
    before it, up to an error that is no longer small beside it); with learning rates that are numbers and
    parameters of 32 or 64 bits. Where a copy of all parameters costs little it is not worth it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return (
        type(optimizer) in (SGD, Adam, AdamW)
        and all(_is_told(group, window) for group in optimizer.param_groups)
        and not are_small(parameters)
    )


def _is_told(group: dict[str, Any], window: int) -> bool:
    longest = 2 if group.get("momentum") and not group["nesterov"] else 1
    numbers = not any(isinstance(value, Tensor) for value in (group["lr"], *group.get("betas", ())))
    plain = not any(group.get(option) for option in ("amsgrad", "capturable", "differentiable"))
    precise = all(
        parameter.dtype in (torch.float32, torch.float64) and not hasattr(parameter, "to_local")
        for parameter in group["params"]
    )
    return window <= longest and numbers and plain and precise


def sample(tensor: Tensor) -> Tensor:
    """Return a copy of some elements of a tensor, spread over it, 1-dim."""
    flat = tensor.detach().reshape(-1)
    if len(flat) <= _SAMPLES:
        return flat.clone()
    return flat[_spread(len(flat), flat.device)]


@functools.cache
def _spread(count: int, device: torch.device) -> Tensor:
    """Return some indices below a count; by the golden ratio, so that they keep to no row or column."""
    fractions = torch.arange(1, _SAMPLES + 1, dtype=torch.float64) * 0.6180339887498949 % 1
    return (fractions * count).long().to(device)


class StateLine:
    """A :class:`~autolr_fast.candidates.StepLine` without ``prev``: ``now + (f - 1) * step``, the step told anew.

    Args:
        optimizer: just stepped.
        lrs: the learning rate of each param group in each of the last steps, the latest last.
        window: how many steps the line spans, 1 or 2.
        parameters: those in question.
        moved: those that had a gradient at the last step; the optimizer passes over the others.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lrs: Sequence[Sequence[float]],
        window: int,
        parameters: Sequence[nn.Parameter],
        moved: Set[nn.Parameter],
    ):
        self.parameters = list(parameters)
        self._moved = [parameter in moved for parameter in parameters]
        self.window = window
        self._gradients = [parameter.grad for parameter in parameters]  # a probe takes them out of sight
        self._optimizer = optimizer
        self._lrs = lrs[-window:]
        groups = enumerate(optimizer.param_groups)
        self._groups = {parameter: index for index, group in groups for parameter in group["params"]}

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return what writes ``now + (f - 1) * step``; see :class:`~autolr_fast.candidates.Line`."""

        def write(factors: Sequence[float]) -> None:
            scales = [1 - factor for factor in factors]
            for index, (value, out) in enumerate(zip(now, rows, strict=True)):
                step, scale = self._step(index, value)
                ops.stack_gradient_candidates([value], [step], _rate(scale, value), scales, [out])

        return write

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter of one candidate; see :class:`~autolr_fast.candidates.Line`."""
        step, scale = self._step(index, now)
        ops.write_gradient_candidate(now, step, _rate(scale, now), 1 - factor, out)

    def coefficients(self, factors: Sequence[float]) -> list[float]:
        """Return ``f - 1`` for each; see :class:`~autolr_fast.candidates.Line`."""
        return [factor - 1 for factor in factors]

    def direction(self, index: int, now: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the step; see :class:`~autolr_fast.candidates.Line`."""
        step, scale = self._step(index, now)
        return torch.mul(step, scale, out=out)

    @torch.no_grad()
    def agrees(self, before: Mapping[nn.Parameter, Tensor]) -> bool:
        """Whether the steps told are the steps taken, as far as samples of the parameters before them show."""
        if any(len(lrs) != len(self._optimizer.param_groups) for lrs in self._lrs) or len(self._lrs) < self.window:
            return False
        for lrs in self._lrs:
            for lr, group in zip(lrs, self._optimizer.param_groups, strict=True):
                if abs(1 - lr * group["weight_decay"]) < _TOLERANCE:  # nothing is left of what was before
                    return False
        right = []
        for index, parameter in enumerate(self.parameters):
            gradient = self._gradients[index]
            if gradient is None and self._moved[index] and self._needs_gradient(index):
                return False
            if gradient is not None and gradient.layout != torch.strided:
                return False
            now, prev = sample(parameter), before[parameter]
            if now.shape != prev.shape or now.device != prev.device or now.dtype != prev.dtype:
                return False
            taken = now - prev
            step, scale = self._step(index, now, sampled=True)
            rounding = 4 * self.window * torch.finfo(now.dtype).eps * torch.maximum(now.abs(), prev.abs())
            size = taken.square().mean().sqrt()
            right.append(((step * scale - taken).abs() <= rounding + _TOLERANCE * (taken.abs() + size)).all())
        groups: dict[torch.device, list[Tensor]] = {}
        for flag in right:
            groups.setdefault(flag.device, []).append(flag)
        return all(bool(torch.stack(flags).all()) for flags in groups.values())

    def _needs_gradient(self, index: int) -> bool:
        if not isinstance(self._optimizer, SGD):
            return False
        group = self._optimizer.param_groups[self._groups[self.parameters[index]]]
        return self.window > 1 or not group["momentum"] or group["nesterov"]

    def _step(self, index: int, now: Tensor, sampled: bool = False) -> tuple[Tensor, float]:
        """Return a tensor and a number whose product is what the steps added to a parameter."""
        parameter, gradient = self.parameters[index], self._gradients[index]
        group = self._optimizer.param_groups[self._groups[parameter]]
        lrs = [lrs[self._groups[parameter]] for lrs in self._lrs]
        if not self._moved[index]:
            return torch.zeros_like(now), 0.0
        state = self._optimizer.state.get(parameter, {})
        tensors = {name: value for name, value in {"grad": gradient, **state}.items() if isinstance(value, Tensor)}
        if sampled:
            tensors = {name: value if name == "step" else sample(value) for name, value in tensors.items()}
        if isinstance(self._optimizer, SGD):
            return _sgd(group, lrs, now, tensors)
        return _adam(group, lrs[-1], now, tensors)


def _rate(scale: float, like: Tensor) -> Tensor:
    """Return a number as [1] float64 where a tensor is: filled there, where a copy would wait for a GPU."""
    return torch.full((1,), scale, dtype=torch.float64, device=like.device)


def _sgd(
    group: dict[str, Any], lrs: Sequence[float], now: Tensor, state: Mapping[str, Tensor]
) -> tuple[Tensor, float]:
    """Solve :class:`torch.optim.SGD`'s step for what it added; the buffer is already this step's."""
    lr, decay, momentum = lrs[-1], group["weight_decay"], group["momentum"]
    buffer = state["momentum_buffer"] if momentum else None
    if len(lrs) == 1 and buffer is not None and not group["nesterov"]:
        return buffer, -lr
    grad = state["grad"].neg() if group["maximize"] else state["grad"]
    if buffer is None or group["nesterov"]:
        # now = prev - lr * (grad + decay * prev + momentum * buffer)
        step = grad if buffer is None else torch.add(grad, buffer, alpha=momentum)
        return (step.add(now, alpha=decay) if decay else step), -lr / (1 - lr * decay)
    # The buffer of the step before: buffer = momentum * earlier + (1 - dampening) * (grad + decay * between)
    between = torch.add(now, buffer, alpha=lr)
    gradient = grad.add(between, alpha=decay) if decay else grad
    earlier = torch.sub(buffer, gradient, alpha=1 - group["dampening"])
    return earlier.mul_(lrs[0] / momentum).add_(buffer, alpha=lr), -1.0


def _adam(group: dict[str, Any], lr: float, now: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """Solve :class:`torch.optim.Adam`'s or AdamW's step for what it added; the moments are already this step's."""
    beta1, beta2 = group["betas"]
    steps = state["step"].double()
    step = state["exp_avg_sq"].sqrt().div_((1 - beta2**steps).sqrt()).add_(group["eps"])
    torch.div(state["exp_avg"], step, out=step).mul_(lr / (1 - beta1**steps))
    if group["decoupled_weight_decay"] and (decay := group["weight_decay"]):
        # now = prev - lr * decay * prev - step
        return step.add_(now, alpha=lr * decay), -1 / (1 - lr * decay)
    return step, -1.0
