"""What is probed: a model, one batch, and an optimizer step that was really taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolr_fast import AutoLR
from autolr_fast._steps import StepLine
from autolr_fast.demo import network

from .models import CharacterTransformer, mlp, perceptron, small_convnet, wide_mlp
from .paper.models import ResNet18

__all__ = ["PROBLEMS", "SEED", "TEXT", "Problem", "make_problem"]

SEED = 0
TEXT = "BENCHMARK_TEXT"
"""Environment variable: a text file that the transformer reads instead of random characters."""


class Problem(NamedTuple):
    """One model just after a step.

    Attributes:
        name: in :data:`PROBLEMS`.
        model: in train mode; its parameters are those after the step, its gradients those that the step followed.
        optimizer: made the step.
        batch: x and y of the step.
        loss_fn: the scalar loss of a model's output and y.
        loss: the scalar loss of a model on the batch.
        prev: the P parameters before the step.
        now: the P parameters after it, as copies: a baseline writes to the live ones.
        loss_before: the loss that the step started from.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[nn.Module], Tensor]
    prev: list[Tensor]
    now: list[Tensor]
    loss_before: float

    def line(self) -> StepLine:
        """Return the line of candidates through the step."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return StepLine(dict(zip(names, self.prev, strict=True)), names, window=1)

    def closure(self) -> Tensor:
        """Return the loss of the model."""
        return self.loss(self.model)

    def forwards(self, count: int) -> None:
        """Run as many plain forwards: what no probe of so many candidates can do without."""
        with torch.no_grad():
            for _ in range(count):
                self.closure()

    def train(self, scheduler: AutoLR | None = None) -> None:
        """Make one training step, under a scheduler or without."""
        self.optimizer.zero_grad()
        loss = scheduler.loss(self.closure) if scheduler else self.closure()
        loss.backward()
        self.optimizer.step()
        if scheduler:
            scheduler.step()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back to where the step ended."""
        torch._foreach_copy_(list(self.model.parameters()), self.now)


def make_problem(name: str, device: str) -> Problem:
    """Build a problem, the same each time, and take its step: SGD with momentum, whose buffer is then empty."""
    torch.manual_seed(SEED)
    make, batch, lr = PROBLEMS[name]
    x, y = batch()
    model, x, y = make().to(device), x.to(device), y.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def loss(model: nn.Module) -> Tensor:
        return loss_fn(model(x), y)

    prev = _copies(model.parameters())
    before = loss(model)
    before.backward()
    optimizer.step()
    now = _copies(model.parameters())
    return Problem(name, model, optimizer, (x, y), loss_fn, loss, prev, now, before.item())


def _copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _images(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape), torch.randint(10, (count,))


_CHARACTERS, _CONTEXT = 65, 128


def _text(count: int = 8) -> tuple[Tensor, Tensor]:
    """Return characters [B, T] and the next of each [B, T]."""
    if path := os.environ.get(TEXT):
        text = Path(path).read_text(encoding="utf-8")
        alphabet = {character: index for index, character in enumerate(sorted(set(text))[:_CHARACTERS])}
        corpus = torch.tensor([alphabet[character] for character in text if character in alphabet])
    else:
        corpus = torch.randint(_CHARACTERS, (100_000,))
    starts = torch.randint(len(corpus) - _CONTEXT, (count,)).tolist()
    rows = torch.stack([corpus[start : start + _CONTEXT + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


# name -> (model, batch, lr); at about these learning rates the first step lowers the loss most
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], float]] = {
    "mlp": (mlp, lambda: (torch.randn(64, 512), torch.randint(16, (64,))), 2.5),
    "perceptron": (perceptron, lambda: (torch.randn(32, 256), torch.randint(10, (32,))), 0.5),
    "small convnet": (small_convnet, lambda: _images(32, 1, 8, 8), 0.5),
    "convnet": (network, lambda: _images(32, 1, 8, 8), 1.0),
    "resnet18": (lambda: ResNet18(10), lambda: _images(32, 3, 32, 32), 0.03),
    "transformer": (lambda: CharacterTransformer(_CHARACTERS, context=_CONTEXT), _text, 6.0),
    "wide mlp": (wide_mlp, lambda: (torch.randn(4, 2048), torch.randint(2048, (4,))), 0.1),
}
"""Sizes: batches of 64, 32, 32, 32, 32, 8 x 128 characters, and 4."""
