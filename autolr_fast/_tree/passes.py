"""Losses and gradients of stacked models on one batch: all in one batched pass, or one after another."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._evaluators.nearby import nearby_step
from .._evaluators.substitution import run_eagerly
from .._evaluators.vmap_rules import FusedLayers
from .._isolation import ModuleStates, RandomStreams

__all__ = [
    "BatchedPass",
    "LossFunction",
    "Pass",
    "Results",
    "Rows",
    "SequentialPass",
    "changing_buffers",
    "difference",
    "rows_of",
]

LossFunction = Callable[[Any, Any], Tensor]
"""The scalar mean loss of a model's output and the target."""


class Rows(NamedTuple):
    """Some stacked models, by the names that a module has for what is in them.

    Attributes:
        parameters: tensors ``[C, *shape]``, of the parameters that are trained.
        buffers: tensors ``[C, *shape]``, of the buffers that the forward changes.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Results(NamedTuple):
    """What one batch gave C models.

    Attributes:
        losses: [C].
        gradients: tensors ``[C, *shape]``, of the parameters that the loss depends on.
        buffers: tensors ``[C, *shape]``, the new values.
    """

    losses: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Pass(ABC):
    """Runs stacked models on the batches of an epoch. It reads them, and changes none.

    Attributes of the modules are put back to what they were when it was made.

    Args:
        model: what they are stacked from; gives all that is not stacked.
        loss_fn: mean loss of an output and a target.
        stacked: names of the buffers that the forward changes.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, stacked: Collection[str]):
        self._model, self._loss_fn = model, loss_fn
        self._still = {name: buffer for name, buffer in model.named_buffers() if name not in stacked}
        self._modules = ModuleStates(list(model.modules()))

    def __call__(self, rows: Rows, x: Any, y: Any) -> Results:
        """Return losses and gradients of C models; x is one object, a tuple or list of arguments, or a dict.

        Raises:
            RuntimeError: if a buffer changes that is not stacked.
        """
        args, kwargs = _arguments(x)

        def loss_of(model: Callable[..., Any]) -> Tensor:
            loss = self._loss_fn(model(*args, **kwargs), y)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
                raise TypeError(f"loss_fn returned {what}: return the mean loss of the batch, a scalar tensor")
            return loss.reshape(())

        versions = [buffer._version for buffer in self._still.values()]
        torch.clear_autocast_cache()  # no cast of other weights
        try:
            with torch.enable_grad(), run_eagerly():
                results = self._run(rows, loss_of)
            for (name, buffer), version in zip(self._still.items(), versions, strict=True):
                if self._model.get_buffer(name) is not buffer or buffer._version != version:
                    raise RuntimeError(
                        f"buffer {name!r} changes at this batch and did not at the first, by which the tree knows "
                        "what differs between branches: let every batch write to it, if only what it is"
                    )
        finally:
            self._modules.restore()  # no other branch must find what this run left there
        return results

    @abstractmethod
    def _run(self, rows: Rows, loss_of: Callable[[Callable[..., Any]], Tensor]) -> Results: ...


class BatchedPass(Pass):
    """One ``vmap`` over the models, differentiated as a whole."""

    def _run(self, rows: Rows, loss_of: Callable[[Callable[..., Any]], Tensor]) -> Results:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in rows.parameters.items()}
        buffers = {name: tensor.clone() for name, tensor in rows.buffers.items()}

        def loss_of_one(leaves: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            values = {**leaves, **buffers}
            with FusedLayers():
                return loss_of(lambda *args, **kwargs: functional_call(self._model, values, args, kwargs))

        with warnings.catch_warnings():
            # An operation that vmap unrolls is right all the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            losses: Tensor = torch.vmap(loss_of_one, randomness="same")(leaves, buffers)
            gradients = _gradients(losses.sum(), leaves)
        for name, gradient in gradients.items():
            # Some come transposed. One by one: no copy of all is made.
            if gradient.stride() != leaves[name].stride():
                gradients[name] = torch.empty_like(leaves[name]).copy_(gradient)
        return Results(losses.detach(), gradients, buffers)


class SequentialPass(Pass):
    """One model at a time, in a copy of the module that holds its values: right for any module."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, stacked: Collection[str]):
        copied = copy.deepcopy(model)
        for module in copied.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # on a GPU, a copy's do not lie in one memory any more
        super().__init__(copied, loss_fn, stacked)
        self._parameters = dict(copied.named_parameters())

    def _run(self, rows: Rows, loss_of: Callable[[Callable[..., Any]], Tensor]) -> Results:
        live = {name: self._parameters[name] for name in rows.parameters}
        with torch.no_grad():
            for name, row in rows.parameters.items():
                live[name].copy_(row[0])
            for name, row in rows.buffers.items():
                self._model.get_buffer(name).copy_(row[0])
        loss = loss_of(self._model)
        if not loss.requires_grad:
            raise ValueError(
                "loss_fn returned a loss that no parameter has a part in: return it as it is computed, without "
                "detach() or no_grad(), and train outside of torch.inference_mode()"
            )
        gradients = {name: grad.to_dense().unsqueeze(0) for name, grad in _gradients(loss, live).items()}
        buffers = {name: self._model.get_buffer(name).detach().clone().unsqueeze(0) for name in rows.buffers}
        return Results(loss.detach().unsqueeze(0), gradients, buffers)

    @torch.no_grad()
    def move_nearby(self, rows: Rows) -> Rows:
        """Give the module weights near those of one model, and return them as rows, in the same memory."""
        for name, row in rows.parameters.items():
            parameter = self._parameters[name].copy_(row[0])
            parameter.add_(nearby_step(parameter))
        return Rows({name: self._parameters[name].detach().unsqueeze(0) for name in rows.parameters}, rows.buffers)


def rows_of(model: nn.Module, buffers: Collection[str]) -> Rows:
    """Return what a module holds as rows of one, in the same memory; of buffers, those of these names."""
    return Rows(
        {name: live.detach().unsqueeze(0) for name, live in model.named_parameters() if live.requires_grad},
        {name: live.detach().unsqueeze(0) for name, live in model.named_buffers() if name in buffers},
    )


def changing_buffers(model: nn.Module, loss_fn: LossFunction, x: Any, y: Any) -> list[str]:
    """Return the names of the buffers that a forward in a copy of the module changes, and of all statistics.

    Raises:
        TypeError: if the loss is not a scalar tensor.
        ValueError: if it does not depend on parameters that require a gradient.
    """
    before = rows_of(model, dict(model.named_buffers()))
    random = RandomStreams()
    after = SequentialPass(model, loss_fn, before.buffers)(before, x, y).buffers
    random.restore()
    statistics = {
        name
        for prefix, module in model.named_modules()
        if getattr(module, "track_running_stats", False)
        for name, _ in module.named_buffers(prefix, recurse=False)
    }
    return [
        name for name, value in before.buffers.items() if name in statistics or not torch.equal(value, after[name])
    ]


def difference(sequential: SequentialPass, batched: BatchedPass, rows: Rows, x: Any, y: Any) -> str | None:
    """Return what is different in a batched pass of a model near the given one; ``None`` if nothing is.

    The sequential pass is right.
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
    # What is 0 but for rounding, as is the gradient of a bias before a normalisation, is so next to the others.
    scale = max(map(_largest, expected.gradients.values()), default=0.0)
    ours, theirs = (
        {
            "the loss": results.losses,
            **{f"the gradient of {name!r}": gradient for name, gradient in results.gradients.items()},
            **results.buffers,
        }
        for results in (seen, expected)
    )
    for name in theirs | ours:
        if not _are_close(ours.get(name), theirs.get(name), scale):
            return f"batched, {name} of a test model is another: vmap treats an operation differently"
    return None


def _are_close(a: Tensor | None, b: Tensor | None, scale: float) -> bool:
    if a is None or b is None:
        return a is b
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


def _gradients(loss: Tensor, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the tensors that the loss depends on."""
    gradients = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
    return {name: grad for name, grad in zip(live, gradients, strict=True) if grad is not None}
