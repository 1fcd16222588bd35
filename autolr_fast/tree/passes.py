"""Losses and gradients of stacked models on one batch: all in one batched pass, or one after another."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..evaluators.nearby import nearby_step
from ..evaluators.substitution import run_eagerly
from ..isolation import ModuleStates, RandomStreams
from ..layers import FusedLayers

__all__ = [
    "BatchedPass",
    "LossFunction",
    "Pass",
    "Results",
    "Rows",
    "SequentialPass",
    "changing_buffers",
    "difference",
]

LossFunction = Callable[[Any, Any], Tensor]
"""The scalar mean loss of a model's output and the target."""


class Rows(NamedTuple):
    """Some stacked models.

    Attributes:
        parameters: P tensors ``[C, *shape]``.
        buffers: Q tensors ``[C, *shape]``, of the buffers that the forward changes.
    """

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]

    def part(self, start: int, stop: int) -> Rows:
        """Return the models ``start`` to ``stop``, in the same memory."""
        return Rows(*([tensor[start:stop] for tensor in tensors] for tensors in self))


class Results(NamedTuple):
    """What one batch gave C models.

    Attributes:
        losses: [C].
        gradients: P tensors ``[C, *shape]``; ``None`` for a parameter that the loss does not depend on.
        buffers: Q tensors ``[C, *shape]``, the new values.
    """

    losses: Tensor
    gradients: Sequence[Tensor | None]
    buffers: Sequence[Tensor]


class Pass(ABC):
    """Runs stacked models on the batches of an epoch. It reads them, and changes none.

    Attributes of the modules are put back to what they were when it was made.

    Args:
        model: what they are stacked from; gives all that is not stacked.
        loss_fn: mean loss of an output and a target.
        parameters: P names of parameters that are stacked.
        buffers: Q names of buffers that the forward changes, and that are stacked.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, parameters: Sequence[str], buffers: Sequence[str]):
        self.model = model
        self.loss_fn = loss_fn
        self.parameters = parameters
        self.buffers = buffers
        stacked = set(buffers)
        self._still = [(name, buffer) for name, buffer in model.named_buffers() if name not in stacked]
        self._modules = ModuleStates(list(model.modules()))

    @abstractmethod
    def __call__(self, rows: Rows, x: Any, y: Any) -> Results:
        """Return losses and gradients.

        Args:
            rows: C models.
            x: what the model takes: one object, a tuple or list of arguments, or a dict of keyword arguments.
            y: the target.
        """

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """See that no buffer changes that is not stacked."""
        versions = [buffer._version for _, buffer in self._still]
        yield
        for (name, buffer), version in zip(self._still, versions, strict=True):
            if self.model.get_buffer(name) is not buffer or buffer._version != version:
                raise RuntimeError(
                    f"buffer {name!r} changes at this batch and did not at the first, by which the tree knows what "
                    "differs between branches: let every batch write to it, if only what it is"
                )


class BatchedPass(Pass):
    """One ``vmap`` over the models, differentiated as a whole."""

    def __call__(self, rows: Rows, x: Any, y: Any) -> Results:
        """See :class:`Pass`."""
        leaves = [tensor.detach().requires_grad_() for tensor in rows.parameters]
        buffers = [tensor.clone() for tensor in rows.buffers]
        args, kwargs = _arguments(x)

        def loss_of(leaves: Sequence[Tensor], buffers: Sequence[Tensor]) -> Tensor:
            values = dict(zip((*self.parameters, *self.buffers), (*leaves, *buffers), strict=True))
            with FusedLayers():
                return _scalar(self.loss_fn(functional_call(self.model, values, args, kwargs), y))

        torch.clear_autocast_cache()  # no cast of other weights
        try:
            with self._watched(), torch.enable_grad(), run_eagerly(), warnings.catch_warnings():
                # An operation that vmap unrolls is right all the same.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                losses: Tensor = torch.vmap(loss_of, randomness="same")(leaves, buffers)
                gradients = list(torch.autograd.grad(losses.sum(), leaves, allow_unused=True))
        finally:
            self._modules.restore()  # what vmap has left there belongs to no branch
        for index, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            # Some come transposed. One by one: no copy of all is made.
            if gradient is not None and gradient.stride() != leaf.stride():
                gradients[index] = torch.empty_like(leaf).copy_(gradient)
        return Results(losses.detach(), gradients, buffers)


class SequentialPass(Pass):
    """One model at a time, in a copy of the module that holds its values: right for any module."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, parameters: Sequence[str], buffers: Sequence[str]):
        super().__init__(_copy_of(model), loss_fn, parameters, buffers)
        self._live = [self.model.get_parameter(name) for name in parameters]

    def __call__(self, rows: Rows, x: Any, y: Any) -> Results:
        """See :class:`Pass`; C is 1."""
        with torch.no_grad():
            for parameter, row in zip(self._live, rows.parameters, strict=True):
                parameter.copy_(row[0])
            for name, row in zip(self.buffers, rows.buffers, strict=True):
                self.model.get_buffer(name).copy_(row[0])
        args, kwargs = _arguments(x)
        torch.clear_autocast_cache()  # no cast of other weights
        try:
            with self._watched(), torch.enable_grad(), run_eagerly():
                loss = _scalar(self.loss_fn(self.model(*args, **kwargs), y))
                gradients = torch.autograd.grad(loss, self._live, allow_unused=True)
            buffers = [self.model.get_buffer(name).detach().clone().unsqueeze(0) for name in self.buffers]
        finally:
            self._modules.restore()  # the next branch must not find what this one left
        dense = (None if gradient is None else gradient.to_dense().unsqueeze(0) for gradient in gradients)
        return Results(loss.detach().unsqueeze(0), list(dense), buffers)

    @torch.no_grad()
    def move_nearby(self, rows: Rows) -> Rows:
        """Give the module weights near those of one model, and return them as rows, in the same memory."""
        for parameter, row in zip(self._live, rows.parameters, strict=True):
            parameter.copy_(row[0])
            parameter.add_(nearby_step(parameter))
        return Rows([parameter.detach().unsqueeze(0) for parameter in self._live], rows.buffers)


def changing_buffers(model: nn.Module, loss_fn: LossFunction, x: Any, y: Any) -> list[str]:
    """Return the names of the buffers that a forward in a copy of the module changes, and of all statistics.

    Raises:
        TypeError: if the loss is not a scalar tensor.
        ValueError: if it does not depend on parameters that require a gradient.
    """
    trial, random = _copy_of(model), RandomStreams()
    before = {name: buffer.detach().clone() for name, buffer in trial.named_buffers()}
    args, kwargs = _arguments(x)
    with torch.enable_grad(), run_eagerly():
        loss = _scalar(loss_fn(trial(*args, **kwargs), y))
    random.restore()
    if not loss.requires_grad:
        raise ValueError(
            "loss_fn returned a loss that no parameter has a part in: return it as it is computed, without "
            "detach() or no_grad(), and train outside of torch.inference_mode()"
        )
    after = dict(trial.named_buffers())
    statistics = {
        name
        for prefix, module in model.named_modules()
        if getattr(module, "track_running_stats", False)
        for name, _ in module.named_buffers(prefix, recurse=False)
    }
    return [name for name, value in before.items() if name in statistics or not torch.equal(value, after[name])]


def _copy_of(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # on a GPU, a copy's do not lie in one memory any more
    return copied


def difference(sequential: SequentialPass, batched: BatchedPass, rows: Rows, x: Any, y: Any) -> str | None:
    """Compare a batched pass with one that is right, of a model with weights near a given one's.

    Args:
        sequential: is right.
        batched: may not be.
        rows: one model.
        x: as in :class:`Pass`.
        y: as in :class:`Pass`.

    Returns:
        What is different; ``None`` if nothing is.
    """
    nearby = sequential.move_nearby(rows)
    random = RandomStreams()
    expected = sequential(nearby, x, y)
    random.restore()
    try:
        seen = batched(nearby, x, y)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        random.restore()
    names = ("the loss", *(f"the gradient of {name!r}" for name in batched.parameters), *batched.buffers)
    # What is 0 but for rounding, as is the gradient of a bias before a normalisation, is so next to the others.
    scale = max((_largest(gradient) for gradient in expected.gradients if gradient is not None), default=0.0)
    for name, one, other in zip(names, _tensors(seen), _tensors(expected), strict=True):
        if (one is None) != (other is None) or (
            one is not None and other is not None and not _are_close(one, other, scale)
        ):
            return f"batched, {name} of a test model is another: vmap treats an operation differently"
    return None


def _tensors(results: Results) -> Iterator[Tensor | None]:
    yield results.losses
    yield from results.gradients
    yield from results.buffers


def _are_close(a: Tensor, b: Tensor, scale: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    exact = a.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(a.device.type)
    return _largest(a - b) <= (1e-3 if exact else 5e-2) * (_largest(b) + 1e-2 * scale)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, dict):
        return (), x
    return (tuple(x) if isinstance(x, (tuple, list)) else (x,)), {}


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise TypeError(f"loss_fn returned {what}: return the mean loss of the batch, a scalar tensor")
    return loss.reshape(())
