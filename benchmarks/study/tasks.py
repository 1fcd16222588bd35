"""What is trained: small tasks, each data, a network, a loss and a measure of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolr_fast import demo

from ..paper.models import ResNet18
from .data import Data, Places, digits, fewer_images, friedman, images, text
from .diffusion import NoisePredictor, denoising_loss
from .finetuning import finetuned_classifier, finetuned_transformer, later_text, other_classes
from .language import TextRNN, text_transformer
from .masked import MaskedAutoencoder, filling_loss
from .speakers import SpeakerClassifier, adapted, encoder, speakers
from .vae import VAE, bound_loss
from .vit import VisionTransformer

__all__ = ["TASKS", "Task", "evaluate", "held_back_loss", "load"]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From network, inputs and targets of a batch to its mean loss."""


def supervised_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean loss of a batch: squared error of numbers, cross-entropy of classes."""
    output = model(x)
    if y.is_floating_point():
        return F.mse_loss(output, y)
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


class Task(NamedTuple):
    """A task.

    Attributes:
        title: what it is.
        measure: ``"accuracy"`` in % (higher is better) or ``"loss"`` (lower).
        data: reads or makes the examples, the same for every seed.
        model: builds the network; it may begin with weights that were pretrained on other data.
        batch_size: examples in a batch.
        steps: of the optimizer.
        place: which of :class:`Places` it reads, if any.
        loss: of a batch; what is random in it comes from torch's global stream.
    """

    title: str
    measure: str
    data: Callable[[Places], Data]
    model: Callable[[Places], nn.Module]
    batch_size: int
    steps: int
    place: str | None = None
    loss: Loss = supervised_loss


@cache
def load(name: str, places: Places) -> Data:
    """Return the data of a task, kept for the next time."""
    return TASKS[name].data(places)


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, data: Data) -> float:
    """Return what the task measures on the examples kept back, each time with the same draws.

    The global random stream goes on as if nothing had been drawn.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        for x, y in zip(*(part.split(500) for part in data.test), strict=True):
            if task.measure == "accuracy":
                total += 100 * (model(x).argmax(1) == y).sum()
            else:
                total += task.loss(model, x, y) * len(y)
    model.train()
    return total.item() / len(data.test[1])


@torch.no_grad()
def held_back_loss(task: Task, model: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of examples in eval mode, each time with the same draws."""
    model.eval()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        loss = task.loss(model, *examples)
    model.train()
    return loss


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))


TASKS: Mapping[str, Task] = {
    "digits": Task(
        "digits, convolutional network", "accuracy", lambda _: digits(0.0), lambda _: demo.network(), 32, 330
    ),
    "noise": Task(
        "digits, 20 % of labels random", "accuracy", lambda _: digits(0.2), lambda _: demo.network(), 32, 660
    ),
    "friedman": Task("Friedman regression, perceptron", "loss", lambda _: friedman(), lambda _: _mlp(), 32, 1000),
    "images": Task(
        "CIFAR-10 at 16 x 16, ResNet-18 of width 8",
        "accuracy",
        images,
        lambda _: ResNet18(10, 8),
        128,
        390,
        place="images",
    ),
    "transformer": Task("text, transformer", "loss", text, lambda _: text_transformer(), 32, 600, place="text"),
    "lstm": Task("text, LSTM", "loss", text, lambda _: TextRNN(nn.LSTM), 32, 1000, place="text"),
    "diffusion": Task(
        "CIFAR-10 at 16 x 16, diffusion",
        "loss",
        fewer_images,
        lambda _: NoisePredictor(),
        32,
        500,
        place="images",
        loss=denoising_loss,
    ),
    "masked": Task(
        "CIFAR-10 at 16 x 16, masked autoencoder",
        "loss",
        fewer_images,
        lambda _: MaskedAutoencoder(),
        32,
        500,
        place="images",
        loss=filling_loss,
    ),
    "dropout": Task(
        "text, transformer with dropout 0.3",
        "loss",
        text,
        lambda _: text_transformer(dropout=0.3),
        32,
        600,
        place="text",
    ),
    "finetuned-images": Task(
        "CIFAR-10 at 16 x 16, 1,000 images of five classes, ResNet-18 pretrained on the other five",
        "accuracy",
        other_classes,
        finetuned_classifier,
        32,
        200,
        place="images",
    ),
    "finetuned-text": Task(
        "text, transformer pretrained on one without capitals",
        "loss",
        later_text,
        finetuned_transformer,
        16,
        300,
        place="text",
    ),
    "speakers": Task(
        "passages of eight speakers, sentence encoder",
        "accuracy",
        speakers,
        lambda _: SpeakerClassifier(encoder()),
        16,
        60,
        place="text",
    ),
    "speakers-adapters": Task(
        "passages of eight speakers, adapters of a sentence encoder",
        "accuracy",
        speakers,
        lambda _: adapted(SpeakerClassifier(encoder())),
        16,
        80,
        place="text",
    ),
    "vae": Task(
        "digits, variational autoencoder",
        "loss",
        lambda _: digits(0.0),
        lambda _: VAE(),
        32,
        400,
        loss=bound_loss,
    ),
    "vit": Task(
        "CIFAR-10 at 16 x 16, vision transformer",
        "accuracy",
        images,
        lambda _: VisionTransformer(10),
        64,
        300,
        place="images",
    ),
    "gru": Task("text, GRU", "loss", text, lambda _: TextRNN(nn.GRU), 32, 300, place="text"),
}
