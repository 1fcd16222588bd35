"""Where the candidates lie: a line through the parameters, and the stacked buffer it is written to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import ops
from .distributed import ProcessGroup, local, mean_over_ranks
from .isolation import CALLED_BACKWARD, Closure, ClosureError, Isolation, scalar_loss

__all__ = [
    "GradientLine",
    "Line",
    "StackedBuffer",
    "StepLine",
    "candidate_parameters",
    "dense_strides",
]


def candidate_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters the optimizer moves, by their (first) name in the model.

    Args:
        model: holds every parameter of the optimizer. Its frozen parameters need no optimizer.
        optimizer: holds every parameter of the model that requires a gradient.

    Returns:
        Name -> parameter, in the order of ``optimizer.param_groups``.

    Raises:
        ValueError: if the two do not belong together; names the first parameter that shows it.
        TypeError: if a parameter is complex or not strided.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: dict[str, nn.Parameter] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = names.pop(id(parameter), None)
            if name is None:
                raise ValueError(
                    f"optimizer.param_groups[{index}]['params'][{position}] (shape {list(parameter.shape)}) is "
                    f"not a parameter of the model ({type(model).__name__}): build the optimizer from this "
                    "model's parameters, after anything that replaces them; if it trains several modules, pass "
                    "nn.ModuleList([...]) of them as the model"
                )
            if parameter.is_complex() or parameter.layout != torch.strided:
                raise TypeError(
                    f"parameter {name!r} is {parameter.dtype}, {parameter.layout}: only real, strided "
                    "parameters have candidates; keep a complex one as its real view (torch.view_as_real)"
                )
            parameters[name] = parameter
    missing = [name for name in names.values() if model.get_parameter(name).requires_grad]
    if missing:
        raise ValueError(
            f"model parameter {missing[0]!r} (and {len(missing) - 1} more) requires a gradient but is not in the "
            "optimizer: add it to the optimizer, freeze it with requires_grad_(False), or pass as the model the "
            "module that this optimizer trains"
        )
    return parameters


class Line(Protocol):
    """The candidates of a probe: one set of parameters for each factor.

    Attributes:
        parameters: the P live parameters that differ between candidates.
        window: how many optimizer steps it spans; 0 if it follows a fresh gradient.
    """

    parameters: list[nn.Parameter]
    window: int

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return a function that writes the candidates of N factors.

        Args:
            now: P tensors, the (local) parameters as training left them; they stay as they are between calls.
            rows: P tensors ``[N, *shape]``, written in place.
        """

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter ``[*shape]`` of one candidate."""

    def coefficients(self, factors: Sequence[float]) -> list[float]:
        """Return N numbers c such that the candidates are ``now + c * direction``."""

    def direction(self, index: int, now: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the direction of one parameter, of its shape.

        Args:
            index: of the parameter.
            now: the (local) parameter as training left it.
            out: where to write it.
        """


class StepLine:
    """``prev + f * (now - prev)``: what the optimizer did in its last ``window`` steps, scaled.

    ``f = 1`` is exactly ``now`` and ``f = 0`` exactly ``prev``; see :func:`autolr_fast.ops.stack_candidates`.

    Args:
        prev: parameter -> its value before the window.
        names: parameter names, for the error.
        window: optimizer steps between ``prev`` and now.

    Raises:
        RuntimeError: if a parameter changed its shape, dtype or device within the window.
    """

    def __init__(self, prev: Mapping[nn.Parameter, Tensor], names: Mapping[nn.Parameter, str], window: int):
        for parameter, before in prev.items():
            now, then = (
                (parameter.shape, parameter.dtype, parameter.device),
                (before.shape, before.dtype, before.device),
            )
            if now != then:
                was, is_now = ((list(shape), *kind) for shape, *kind in (then, now))
                raise RuntimeError(
                    f"parameter {names[parameter]!r} was {was} before the step and is {is_now} now: move or "
                    "convert the model before training, not between optimizer.step() and scheduler.step()"
                )
        self.parameters = list(prev)
        self.window = window
        self._prev = [local(before) for before in prev.values()]

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return what writes ``prev + f * (now - prev)``; see :class:`Line`."""
        return ops.candidate_writer(self._prev, now, rows)

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter of one candidate; see :class:`Line`."""
        ops.write_candidate(self._prev[index], now, factor, out)

    def coefficients(self, factors: Sequence[float]) -> list[float]:
        """Return ``f - 1`` for each; see :class:`Line`."""
        return [factor - 1 for factor in factors]

    def direction(self, index: int, now: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``now - prev``; see :class:`Line`."""
        return torch.sub(now, self._prev[index], out=out)


class GradientLine:
    """``now - f * lr * grad``: the source to the letter, along one fresh gradient of the closure.

    Args:
        model: its buffers, gradients and random-number streams are left as they are.
        optimizer: gives the parameters and, for each, the learning rate of its group.
        closure: returns the scalar loss.
        process_group: the ranks whose gradients are averaged.

    Raises:
        ClosureError: if the loss does not depend on the parameters.
    """

    window = 0

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        closure: Closure,
        process_group: ProcessGroup | None = None,
    ):
        groups = optimizer.param_groups
        group_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
        trained = [parameter for parameter in group_of if parameter.requires_grad]
        # DistributedDataParallel would wait for a backward() that never comes.
        alone = model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
        # The backward runs before the buffers are put back: it may have saved them.
        with alone, Isolation(model) as isolation, isolation.rewound(), torch.enable_grad():
            loss = scalar_loss(closure)
            if any(parameter.grad is not None for parameter in trained):
                raise ClosureError(CALLED_BACKWARD)
            if not loss.requires_grad:
                raise ClosureError(
                    'direction="gradient" differentiates the loss, but the closure returned a detached one: '
                    "return loss_fn(model(x), y) itself"
                )
            gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        self.parameters = trained
        self._gradients = [mean_over_ranks(gradient.to_dense(), process_group) for gradient in gradients]
        device = next((group["lr"].device for group in groups if isinstance(group["lr"], Tensor)), None)
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64, device=device).reshape(()) for group in groups]
        self._rates = torch.stack([rates[group_of[parameter]] for parameter in trained])

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return what writes ``now - f * lr * grad``; see :class:`Line`."""
        return ops.gradient_candidate_writer(now, self._gradients, self._rates, rows)

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter of one candidate; see :class:`Line`."""
        rate = self._rates[index : index + 1].to(now.device)
        ops.write_gradient_candidate(now, self._gradients[index], rate, factor, out)

    def coefficients(self, factors: Sequence[float]) -> list[float]:
        """Return the factors; see :class:`Line`."""
        return list(factors)

    def direction(self, index: int, now: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``-lr * grad``; see :class:`Line`."""
        return torch.mul(self._gradients[index], -self._rates[index].to(now.device, now.dtype), out=out)


class StackedBuffer:
    """One flat allocation per (device, dtype) that holds ``rows`` candidates, parameter-major.

    Each parameter's candidates are contiguous, ``[rows, *shape]``, and keep the parameter's strides within a
    row, so that a batched operation reads its operand without a copy.

    Args:
        parameters: P parameters, of any shapes, dtypes and devices.
        rows: candidates held at once.

    Attributes:
        stacked: P tensors ``[rows, *shape]``, views of the flat allocations.

    Example:
        >>> buffer = StackedBuffer([torch.zeros(2, 3), torch.zeros(4)], rows=5)
        >>> [list(tensor.shape) for tensor in buffer.stacked]
        [[5, 2, 3], [5, 4]]
    """

    _ALIGNMENT = 64  # elements: every parameter starts on a cache line and on a vector load

    def __init__(self, parameters: Sequence[Tensor], rows: int):
        self.rows = rows
        self._layout = self._layout_of(parameters)
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        offsets = []
        for parameter in parameters:
            kind = (parameter.device, parameter.dtype)
            offsets.append(sizes.get(kind, 0))
            padded = math.ceil(rows * parameter.numel() / self._ALIGNMENT) * self._ALIGNMENT
            sizes[kind] = offsets[-1] + padded
        flat = {kind: torch.empty(size, device=kind[0], dtype=kind[1]) for kind, size in sizes.items()}
        self.stacked = [
            flat[parameter.device, parameter.dtype].as_strided(
                (rows, *parameter.shape), (parameter.numel(), *dense_strides(parameter)), offset
            )
            for parameter, offset in zip(parameters, offsets, strict=True)
        ]

    def fits(self, parameters: Sequence[Tensor], rows: int) -> bool:
        """Whether this buffer can hold ``rows`` candidates of these parameters."""
        return rows <= self.rows and self._layout == self._layout_of(parameters)

    @staticmethod
    def _layout_of(parameters: Sequence[Tensor]) -> list[tuple[object, ...]]:
        return [(p.shape, p.stride(), p.dtype, p.device) for p in parameters]


def dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Return the parameter's own strides if it is dense, else those of a dense tensor most like it."""
    if parameter.is_contiguous():
        return parameter.stride()
    return torch.empty_like(parameter, device="meta").stride()
