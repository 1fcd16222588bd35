"""Forward and backward of a training step: launched one by one, compiled, or replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .log import RunError

__all__ = ["STEPS", "Captured", "Passes", "loss_of"]

STEPS = ("eager", "compiled", "captured")
"""The ways to run them: the first is the reference, the last has the fewest launches."""
_WARM_UP = 3  # runs before a capture: what is initialised at first use cannot be captured


class Passes:
    """Launches the kernels of forward and backward one by one.

    Args:
        model: whose parameters get gradients.
        forward: what is called instead, as its compiled form.
    """

    def __init__(self, model: nn.Module, forward: nn.Module | None = None):
        self._model = model
        self._forward = model if forward is None else forward

    def begin(self, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """Forget the gradients, and return the loss of a batch as a closure.

        The first call of the closure is that of training; probes make the others.

        Args:
            images: [B, 3, H, W], normalised.
            labels: [B].
        """
        self._model.zero_grad()
        return partial(loss_of, self._forward, images, labels)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss that the first call returned."""
        loss.backward()


class Captured(Passes):
    """Replays forward and backward as one CUDA graph, and the forward of a probe as another.

    The optimizer's step is no part of a graph: its hooks tell AutoLR of the step, and its rate is a number.
    Gradients and both losses lie at fixed addresses, where the next replay writes. A closure that is to be
    differentiated runs eagerly.

    Args:
        model: in train mode; its buffers are left as they are.
        images: of any batch, [B, 3, H, W]; all batches have its shape.
        labels: [B].
        replays_probes: whether candidates lie in the live parameters, which are what a graph reads.

    Raises:
        RunError: if that cannot be captured.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, replays_probes: bool):
        super().__init__(model)
        self._batch = images.clone(), labels.clone()
        statistics = [buffer.clone() for buffer in model.buffers()]
        self._train = record(self._forward_and_backward, images.device)
        self._score = record(self._forward_alone, images.device) if replays_probes else None
        for buffer, value in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(value)
        self._is_new = False  # whether the batch is still to be trained on

    def begin(self, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """Put a batch where the graphs read it; see :meth:`Passes.begin`."""
        for place, values in zip(self._batch, (images, labels), strict=True):
            place.copy_(values)
        self._is_new = True
        return self._loss

    def backward(self, loss: Tensor) -> None:
        """Do nothing: the replay that wrote the loss wrote the gradients."""

    def _loss(self) -> Tensor:
        if self._is_new:
            self._is_new = False
            return self._train()
        if self._score is None or torch.is_grad_enabled():
            return loss_of(self._model, *self._batch)
        return self._score()

    def _forward_and_backward(self) -> Tensor:
        self._model.zero_grad()  # a backward writes gradients then, instead of adding to them
        loss = loss_of(self._model, *self._batch)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _forward_alone(self) -> Tensor:
        return loss_of(self._model, *self._batch)


def loss_of(forward: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return F.cross_entropy(forward(images), labels)


def record(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Return a function that launches again what ``run`` launches, and returns the tensor that it writes.

    Args:
        run: is called a few times; the last time, nothing is computed.
        device: a GPU.

    Raises:
        RunError: if the device has no graphs, or something cannot be captured.
    """
    if device.type != "cuda":
        raise RunError(f"--step captured: {device} has no CUDA graphs; use --step eager or compiled")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            loss = run()
    except RuntimeError as error:
        raise RunError(f"--step captured: {error}; use --step eager or compiled") from error

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay
