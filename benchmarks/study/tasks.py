"""What is trained: small tasks, each data, a network, a loss and a measure of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolr_fast import demo

from ..models import CharacterTransformer
from ..paper.data import DataError, load_dataset
from ..paper.models import ResNet18
from .diffusion import NoisePredictor, denoising_loss
from .masked import MaskedAutoencoder, filling_loss

__all__ = ["TASKS", "Data", "Places", "Task", "batch", "evaluate", "load"]


class Places(NamedTuple):
    """Where the data lie that are not made here, ``None`` if nowhere: CIFAR-10 as parquet, decoded, and a text."""

    images: Path | None
    cache: Path
    text: Path | None


class Data(NamedTuple):
    """Examples to train on and examples to test with, inputs [M, ...] and targets [M, ...]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


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
        model: builds the network.
        batch_size: examples in a batch.
        steps: of the optimizer.
        place: which of :class:`Places` it reads, if any.
        loss: of a batch; what is random in it comes from torch's global stream.
    """

    title: str
    measure: str
    data: Callable[[Places], Data]
    model: Callable[[], nn.Module]
    batch_size: int
    steps: int
    place: str | None = None
    loss: Loss = supervised_loss


class TextLSTM(nn.Module):
    """A recurrent network that predicts the next character, [B, T] -> logits [B, T, characters]."""

    def __init__(self, characters: int, width: int = 128):
        super().__init__()
        self.characters = nn.Embedding(characters, width // 2)
        self.lstm = nn.LSTM(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits [B, T, characters] of text [B, T]."""
        return self.head(self.lstm(self.characters(text))[0])


def batch(data: Data, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the training batch of a step, counted from 0: each epoch has an order of its own."""
    x, y = data.train
    epoch, index = divmod(step, len(y) // size)
    order = _order(len(y), 1000 * seed + epoch)
    chosen = order[index * size : (index + 1) * size]
    return x[chosen], y[chosen]


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


@cache
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _digits(wrong: float) -> Data:
    """Return scikit-learn's digits, a share of the training labels replaced by random ones."""
    digits = demo.load_digits(seed=0)
    x, y = digits.train
    generator = torch.Generator().manual_seed(1)
    replaced = torch.rand(len(y), generator=generator) < wrong
    random = torch.randint(10, y.shape, generator=generator)
    test = tuple(torch.cat(parts) for parts in zip(digits.validation, digits.test, strict=True))
    return Data((x, torch.where(replaced, random, y)), test)  # type: ignore[arg-type]


def _friedman() -> Data:
    """Return Friedman's first regression problem: five of ten inputs count, targets standardised."""
    from sklearn.datasets import make_friedman1  # noqa: PLC0415

    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in make_friedman1(6000, noise=1.0, random_state=0))
    x, y = 2 * x - 1, ((y - y.mean()) / y.std()).unsqueeze(1)
    return Data((x[:4000], y[:4000]), (x[4000:], y[4000:]))


def _images(places: Places) -> Data:
    """Return 10,000 images of CIFAR-10 to train on and 5,000 to test with, 16 x 16, each channel standardised."""
    assert places.images is not None
    dataset = load_dataset(places.images, places.cache, option="--images")
    parts = (dataset.train_images[:10_000], dataset.test_images[:5_000])
    x, test = (F.avg_pool2d(images.float(), 2) for images in parts)
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, test = (((images - mean) / deviation).contiguous(memory_format=torch.channels_last) for images in (x, test))
    return Data((x, dataset.train_labels[:10_000]), (test, dataset.test_labels[:5_000]))


def _fewer_images(places: Places) -> Data:
    """Return the same images, of which 2,000 to test with."""
    train, (test, labels) = _images(places)
    return Data(train, (test[:2000], labels[:2000]))


_CONTEXT = 64
_PIECES = 100


def _text(places: Places) -> Data:
    """Return the text in pieces of 64 characters: nine tenths of it, and the 500 pieces that follow."""
    assert places.text is not None
    try:
        text = places.text.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"--text {places.text} cannot be read: {error.strerror}; give a file with a text"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"--text {places.text} is no text in UTF-8: {error}; convert it, or give another"
        ) from error
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    if len(alphabet) > _CHARACTERS:
        raise DataError(
            f"--text {places.text} has {len(alphabet)} different characters: give one of at most {_CHARACTERS}"
        )
    if len(text) <= _PIECES * _CONTEXT:
        raise DataError(
            f"--text {places.text} has {len(text)} characters: give one of more than {_PIECES * _CONTEXT}"
        )
    corpus = torch.tensor([alphabet[character] for character in text])
    starts = torch.arange(0, len(corpus) - _CONTEXT - 1, _CONTEXT)
    pieces = corpus[starts[:, None] + torch.arange(_CONTEXT + 1)]
    kept = len(pieces) * 9 // 10
    train, test = pieces[:kept], pieces[kept : kept + 500]
    return Data((train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:]))


_CHARACTERS = 65


def _transformer(dropout: float = 0.0) -> CharacterTransformer:
    return CharacterTransformer(_CHARACTERS, width=64, layers=2, heads=2, context=_CONTEXT, dropout=dropout)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))


TASKS: Mapping[str, Task] = {
    "digits": Task("digits, convolutional network", "accuracy", lambda _: _digits(0.0), demo.network, 32, 330),
    "noise": Task("digits, 20 % of labels random", "accuracy", lambda _: _digits(0.2), demo.network, 32, 660),
    "friedman": Task("Friedman regression, perceptron", "loss", lambda _: _friedman(), _mlp, 32, 1000),
    "images": Task(
        "CIFAR-10 at 16 x 16, ResNet-18 of width 8",
        "accuracy",
        _images,
        lambda: ResNet18(10, 8),
        128,
        390,
        place="images",
    ),
    "transformer": Task("text, transformer", "loss", _text, _transformer, 32, 600, place="text"),
    "lstm": Task("text, LSTM", "loss", _text, lambda: TextLSTM(_CHARACTERS), 32, 1000, place="text"),
    "diffusion": Task(
        "CIFAR-10 at 16 x 16, diffusion",
        "loss",
        _fewer_images,
        NoisePredictor,
        32,
        500,
        place="images",
        loss=denoising_loss,
    ),
    "masked": Task(
        "CIFAR-10 at 16 x 16, masked autoencoder",
        "loss",
        _fewer_images,
        MaskedAutoencoder,
        32,
        500,
        place="images",
        loss=filling_loss,
    ),
    "dropout": Task(
        "text, transformer with dropout 0.3",
        "loss",
        _text,
        lambda: _transformer(dropout=0.3),
        32,
        600,
        place="text",
    ),
}
