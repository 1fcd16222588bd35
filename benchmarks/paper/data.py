"""Images from parquet files: decoded once, kept whole on the device, served as augmented batches."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

__all__ = ["CIFAR_10", "Batches", "DataError", "Dataset", "load_dataset", "name_of", "save_atomically", "suffix_of"]

CIFAR_10 = "fcdfc1194f77b600cbbc597e2175fc833e6afaaf589ba78da8e22fc8d320589f"
"""Digest of the data set that the source's figures are of."""
_NAMES: Mapping[str, str] = {
    CIFAR_10: "CIFAR-10",
    "4c623e5fafd382e2f0e2c0bf7de20313a80f2201c98919a3194b632a0872e831": "CIFAR-100",
}
_LABELS = ("label", "fine_label")  # CIFAR-10's column, CIFAR-100's
_PADDING = 4  # pixels on each side, of which the random crop takes some away


class DataError(Exception):
    """The data cannot be used; says which, why, and what to do."""


class Dataset(NamedTuple):
    """A whole data set: uint8 images [M, 3, H, W] and int64 labels [M], for training and for testing.

    ``digest`` identifies the decoded bytes, wherever and in whatever shards they are kept.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    digest: str

    @property
    def classes(self) -> int:
        """The number of classes, from the training labels."""
        return int(self.train_labels.max()) + 1


class Batches:
    """The training batch of each step: a pure function of the step, so that resuming needs no state.

    The order of the images is drawn from (seed, epoch), flips and crops from (seed, step). The images that do
    not fill a batch at the end of an epoch are left to the next, in its own order.

    Args:
        images: uint8 [M, 3, H, W], on the device of training.
        labels: int64 [M].
        batch_size: B, at most M.
        seed: of order and augmentation.
        augment: whether images are flipped, padded by 4 pixels and cropped at random.

    Attributes:
        count: M.
        per_epoch: batches in an epoch.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int, augment: bool):
        self.count = len(images)
        self.per_epoch = self.count // batch_size
        self._images = images
        self._labels = labels
        self._batch_size = batch_size
        self._seed = seed
        self._augment = augment
        self._mean, self._std = _statistics(images)
        self._epoch = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, H, W], normalised, and labels [B] of a step, counted from 0."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = _generator(f"order {self._seed} {epoch}")
            self._order = torch.randperm(self.count, generator=generator).to(self._images.device)
            self._epoch = epoch
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        return self._take(chosen, f"augment {self._seed} {step}")

    def random_batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return images [size, 3, H, W], normalised, and labels [size], drawn anew and with replacement."""
        generator = _generator(f"draw {self._seed} {step}")
        chosen = _to(self._images.device, torch.randint(self.count, (size,), generator=generator))
        return self._take(chosen, f"augment drawn {self._seed} {step}")

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images [B, 3, H, W] so that the training set's channels have mean 0 and deviation 1."""
        return ((images.float() - self._mean) / self._std).contiguous(memory_format=torch.channels_last)

    def _take(self, chosen: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        images = self._images[chosen]
        if self._augment:
            images = _flip_and_crop(images, _generator(stream))
        return self.normalize(images), self._labels[chosen]


def name_of(digest: str) -> str:
    """Return what a data set is called in tables and pictures, by the digest of :class:`Dataset`."""
    return _NAMES.get(digest, f"images {digest[:8]}")


def suffix_of(digest: str) -> str:
    """Return what keeps the files of a data set apart from those of CIFAR-10, which have no suffix.

    Example:
        >>> suffix_of(CIFAR_10), suffix_of("0123456789")
        ('', '-images01234567')
    """
    return "" if digest == CIFAR_10 else "-" + name_of(digest).replace("-", "").replace(" ", "").lower()


def load_dataset(directory: Path, cache: Path, option: str = "--data") -> Dataset:
    """Return the images of ``train-*.parquet`` and ``test-*.parquet``, decoded at the first call only.

    Each row has a struct ``img`` with the encoded image in ``bytes``, and an integer ``label`` (or
    ``fine_label``).

    Args:
        directory: holds the shards.
        cache: directory of the decoded data; made if it does not exist.
        option: what the directory was given by, for errors.

    Raises:
        DataError: if there are no such files, or what they hold is not images with labels.
    """
    if not directory.is_dir():
        raise DataError(f"{option} {directory}: there is no such directory; give the one with train-*.parquet")
    shards = {split: sorted(directory.glob(f"{split}-*.parquet")) for split in ("train", "test")}
    for split, paths in shards.items():
        if not paths:
            raise DataError(
                f"{option} {directory}: holds no {split}-*.parquet; give the directory with both train-*.parquet "
                "and test-*.parquet"
            )
    cached = cache / f"{_cache_key([*shards['train'], *shards['test']])}.pt"
    if cached.exists():
        return Dataset(*torch.load(cached, weights_only=True))
    train_images, train_labels = _decode(shards["train"])
    test_images, test_labels = _decode(shards["test"])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{option} {directory}: training images are {list(train_images.shape[1:])} and test images "
            f"{list(test_images.shape[1:])}; both must have one shape"
        )
    if test_labels.max() > train_labels.max():
        raise DataError(
            f"{option} {directory}: test label {int(test_labels.max())} is above the largest training label, "
            f"{int(train_labels.max())}; both must be of the same classes"
        )
    tensors = (train_images, train_labels, test_images, test_labels)
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    dataset = Dataset(*tensors, digest.hexdigest())
    save_atomically(tuple(dataset), cached)
    return dataset


def _cache_key(paths: Sequence[Path]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return "images-" + hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def save_atomically(content: object, path: Path) -> None:
    """Write what ``torch.load`` is to read; who reads meanwhile finds all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")  # several runs may write at once
    torch.save(content, temporary)
    temporary.replace(path)


def _decode(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Return images [M, 3, H, W] and labels [M] of all shards, in the order of their names."""
    try:
        import numpy as np  # noqa: PLC0415, needed only until the data are cached
        import pyarrow.parquet as pq  # noqa: PLC0415
        from PIL import Image  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"decoding needs {error.name}: pip install '.[dev]'") from error

    images: list[Tensor] = []
    labels: list[Tensor] = []
    for path in paths:
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}; fetch it again") from error
        label = next((name for name in _LABELS if name in table.column_names), None)
        if label is None or "img" not in table.column_names:
            raise DataError(
                f"{path} has the columns {table.column_names}: expected 'img' and one of {', '.join(_LABELS)}"
            )
        labels.append(torch.tensor(table[label].to_pylist(), dtype=torch.int64))
        for row, image in enumerate(
            tqdm(table["img"].to_pylist(), desc=f"decoding {path.name}", unit="image", leave=False)
        ):
            try:
                pixels = np.array(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
            except (OSError, TypeError, KeyError) as error:
                raise DataError(f"{path}, row {row}: not an image ({error}); fetch the file again") from error
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"{path}, row {row}: shape {list(images[-1].shape)} where the first image has "
                    f"{list(images[0].shape)}; all images must have one shape"
                )
    if not images:
        raise DataError(f"{paths[0]} holds no images")
    return torch.stack(images), torch.cat(labels)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel, [3, 1, 1], from exact integer sums."""
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double().cpu()
    values = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = (counts @ values) / total
    variance = (counts @ values.square()) / total - mean.square()
    std = variance.sqrt().clamp_min(1.0)  # a channel of one colour stays at 0
    return tuple(value.float().view(3, 1, 1).to(images.device) for value in (mean, std))  # type: ignore[return-value]


def _flip_and_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image [B, 3, H, W] padded with black, cropped at random and flipped half of the time."""
    batch, _, height, width = images.shape
    device = images.device
    # Drawn on the CPU, so that a GPU trains on the same images.
    top = _to(device, torch.randint(2 * _PADDING + 1, (batch, 1), generator=generator))
    left = _to(device, torch.randint(2 * _PADDING + 1, (batch, 1), generator=generator))
    flip = _to(device, torch.rand(batch, 1, generator=generator) < 0.5)
    row = top + torch.arange(height, device=device)
    column = torch.arange(width, device=device)
    column = left + torch.where(flip, width - 1 - column, column)
    padded = F.pad(images, (_PADDING,) * 4)
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=device).view(1, -1, 1, 1)
    return padded[image, channel, row[:, None, :, None], column[:, None, None, :]]


def _to(device: torch.device, drawn: Tensor) -> Tensor:
    """Return the tensor on a device, which is not waited for."""
    # CUDA has read memory that is not pinned when the call returns.
    return drawn.to(device, non_blocking=True)


def _generator(stream: str) -> torch.Generator:
    """Return a generator whose seed is a hash of the stream's name: streams of near seeds share nothing."""
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(seed)
