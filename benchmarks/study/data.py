"""What is learnt: digits, a regression problem, images and a text, some to train on and some to test with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autolr_fast import demo

from ..paper.data import DataError, Dataset, load_dataset

__all__ = [
    "CHARACTERS",
    "CONTEXT",
    "Data",
    "Places",
    "alphabet",
    "batch",
    "digits",
    "divided",
    "fewer_images",
    "friedman",
    "halved",
    "hold_back",
    "images",
    "pieces",
    "read_images",
    "read_text",
    "text",
]

CHARACTERS = 65
"""Different ones that a text may have."""
CONTEXT = 64
"""Characters in a piece of the text."""


class Places(NamedTuple):
    """Where the data lie that are not made here, ``None`` if nowhere: CIFAR-10 as parquet, a cache, and a text."""

    images: Path | None
    cache: Path
    text: Path | None


class Data(NamedTuple):
    """Examples to train on and examples to test with, inputs [M, ...] and targets [M, ...]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def batch(data: Data, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the training batch of a step, counted from 0: each epoch has an order of its own."""
    x, y = data.train
    epoch, index = divmod(step, len(y) // size)
    order = _order(len(y), 1000 * seed + epoch)
    chosen = order[index * size : (index + 1) * size]
    return x[chosen], y[chosen]


def hold_back(data: Data, seed: int) -> tuple[Data, tuple[Tensor, Tensor]]:
    """Return the data less a tenth of the training examples, and at most 500 of that tenth."""
    count = len(data.train[1])
    order = _order(count, _HELD_BACK_SEED + seed)
    x, y = data.train
    held, kept = order[: count // 10], order[count // 10 :]
    return Data((x[kept], y[kept]), data.test), (x[held[:500]], y[held[:500]])


def digits(wrong: float) -> Data:
    """Return scikit-learn's digits, a share of the training labels replaced by random ones."""
    bunch = demo.load_digits(seed=0)
    x, y = bunch.train
    generator = torch.Generator().manual_seed(1)
    replaced = torch.rand(len(y), generator=generator) < wrong
    random = torch.randint(10, y.shape, generator=generator)
    test = tuple(torch.cat(parts) for parts in zip(bunch.validation, bunch.test, strict=True))
    return Data((x, torch.where(replaced, random, y)), test)  # type: ignore[arg-type]


def friedman() -> Data:
    """Return Friedman's first regression problem: five of ten inputs count, targets standardised."""
    from sklearn.datasets import make_friedman1  # noqa: PLC0415

    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in make_friedman1(6000, noise=1.0, random_state=0))
    x, y = 2 * x - 1, ((y - y.mean()) / y.std()).unsqueeze(1)
    return Data((x[:4000], y[:4000]), (x[4000:], y[4000:]))


def images(places: Places) -> Data:
    """Return 10,000 images of CIFAR-10 to train on and 5,000 to test with, 16 x 16, each channel standardised."""
    dataset = read_images(places)
    x, test = halved(dataset.train_images[:10_000], dataset.test_images[:5_000])
    return Data((x, dataset.train_labels[:10_000]), (test, dataset.test_labels[:5_000]))


def fewer_images(places: Places) -> Data:
    """Return the same images, of which 2,000 to test with."""
    train, (test, labels) = images(places)
    return Data(train, (test[:2000], labels[:2000]))


def read_images(places: Places) -> Dataset:
    """Return all of CIFAR-10."""
    assert places.images is not None
    return load_dataset(places.images, places.cache, option="--images")


def halved(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return images [M, 3, H, W] at half the resolution, standardised by the channels of those to train on."""
    x, other = (F.avg_pool2d(part.float(), 2) for part in (train, test))
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, other = (((part - mean) / deviation).contiguous(memory_format=torch.channels_last) for part in (x, other))
    return x, other


_HELD_BACK_SEED = 10**6  # beyond those of the epochs
_PIECES = 100


def text(places: Places) -> Data:
    """Return the text in pieces of 64 characters: nine tenths of it, and the 500 pieces that follow."""
    written = read_text(places)
    return divided(pieces(written, alphabet(written)))


def read_text(places: Places) -> str:
    """Return the text."""
    assert places.text is not None
    try:
        written = places.text.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"--text {places.text} cannot be read: {error.strerror}; give a file with a text"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"--text {places.text} is no text in UTF-8: {error}; convert it, or give another"
        ) from error
    if (count := len(set(written))) > CHARACTERS:
        raise DataError(f"--text {places.text} has {count} different characters: give one of at most {CHARACTERS}")
    if len(written) <= _PIECES * CONTEXT:
        raise DataError(
            f"--text {places.text} has {len(written)} characters: give one of more than {_PIECES * CONTEXT}"
        )
    return written


def alphabet(written: str) -> dict[str, int]:
    """Return the number of each character of a text."""
    return {character: index for index, character in enumerate(sorted(set(written)))}


def pieces(written: str, numbers: Mapping[str, int]) -> Tensor:
    """Return a text in pieces [M, 65], the last character of each the first of the next."""
    corpus = torch.tensor([numbers[character] for character in written])
    starts = torch.arange(0, len(corpus) - CONTEXT - 1, CONTEXT)
    return corpus[starts[:, None] + torch.arange(CONTEXT + 1)]


def divided(cut: Tensor, first: float = 0.0) -> Data:
    """Return pieces [M, 65] from a share of them on up to nine tenths, and the 500 that follow."""
    begin, end = int(len(cut) * first), len(cut) * 9 // 10
    train, test = cut[begin:end], cut[end : end + 500]
    return Data((train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:]))


@cache
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
