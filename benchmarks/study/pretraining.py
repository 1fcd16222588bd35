"""Pretraining: done once, then read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..paper.data import save_atomically
from .data import Data, Places, batch

__all__ = ["Pretraining", "pretrained"]


class Pretraining(NamedTuple):
    """How a network is pretrained: with AdamW, whose rate falls to 0 as a cosine does."""

    steps: int
    batch_size: int
    lr: float


def pretrained(
    build: Callable[[], nn.Module], data: Data, how: Pretraining, places: Places
) -> Mapping[str, Tensor]:
    """Return the state of a classifier that was pretrained: at the first call only, then read from a file.

    The file's name is a hash of the first weights, of the training data and of how it is trained. Processes that
    pretrain at the same time write the same.

    Args:
        build: makes the network, from the seed 0.
        data: what it is pretrained on.
        how: steps, batch size and learning rate.
        places: its cache has the file.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        model = build()
        path = places.cache / f"pretrained-{_digest([*model.state_dict().values(), *data.train], repr(how))}.pt"
        if not path.exists():
            _pretrain(model, data, how)
            save_atomically(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def _pretrain(model: nn.Module, data: Data, how: Pretraining) -> None:
    optimizer = AdamW(model.parameters(), lr=how.lr)
    scheduler = CosineAnnealingLR(optimizer, how.steps)
    for step in range(how.steps):
        x, y = batch(data, step, how.batch_size, seed=0)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        scheduler.step()


def _digest(tensors: Iterable[Tensor], more: str) -> str:
    digest = hashlib.sha256(more.encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
