"""One training of ResNet-18 under one scheduler, from its first step or from its last checkpoint."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from tqdm import tqdm

import autolr_fast
from autolr_fast import AutoLR

from .. import resident
from .data import Batches, load_dataset
from .log import Log, RunError, mark
from .models import ResNet18
from .passes import Captured, Passes, loss_of
from .schedulers import scheduler

__all__ = ["Run"]

_FREE_ON_RESUME = ("data", "out", "cache", "steps")  # they say where, or until when, but not what is computed
_FLUSH_EVERY = 100  # steps
_NARROW = 8  # channels: with fewer, oneDNN of torch 2.13 overruns its memory on some CPUs


class Run:
    """One training, from its first step or from the checkpoint in ``args.out``.

    Args:
        args: what ``python -m benchmarks.paper.train --help`` lists.
        command: the command line, for the log.

    Raises:
        RunError: if that cannot be run, or is not how the run in ``args.out`` was started.
        DataError: if the data cannot be used.
    """

    def __init__(self, args: argparse.Namespace, command: str):
        self.args = args
        self.command = command
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            _make_cuda_deterministic()

        data = load_dataset(args.data, args.cache)
        self.digest = data.digest
        train, validation, test = _sizes(args, len(data.train_labels), len(data.test_labels))
        images, labels = data.train_images.to(self.device), data.train_labels.to(self.device)
        self.batches = Batches(images[:train], labels[:train], args.batch_size, args.seed, augment=args.augment)
        self.validation = (images[-validation:], labels[-validation:])
        self.test = (data.test_images[:test].to(self.device), data.test_labels[:test].to(self.device))
        self.total_steps = args.epochs * self.batches.per_epoch
        self.last_step = min(args.steps or self.total_steps, self.total_steps)

        torch.manual_seed(args.seed)
        if args.width < _NARROW:
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        self.model = ResNet18(data.classes, args.width).to(self.device, memory_format=torch.channels_last)
        self.optimizer = SGD(
            self.model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        self.scheduler = scheduler(args, self.optimizer, self.model, self.total_steps, self.batches.per_epoch)
        self.passes = self._passes()
        self.step = 0
        self.seconds = {"training": 0.0, "probing": 0.0, "evaluating": 0.0}
        self.peak = 0

        args.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = args.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.log = self._resume()
        else:
            self.log = Log(args.out / "log.jsonl", length=0)
            self.log.write(self._header(data.classes))

    def train(self) -> None:
        """Take the steps that are left, up to ``--steps``."""
        if self.step >= self.last_step:
            print(f"{self.args.out}: its {self.step} steps are done; raise --steps to go on", file=sys.stderr)
        interval = 0.5 if sys.stderr.isatty() else 30.0
        progress = tqdm(
            total=self.last_step, initial=self.step, desc=self.args.scheduler, unit="step", mininterval=interval
        )
        self._clock = time.perf_counter()
        while self.step < self.last_step:
            self._train_step()
            at_end = self.step == self.last_step
            validate = at_end or self.step % (self.args.eval_every or self.batches.per_epoch) == 0
            save = at_end or self.step % self.args.checkpoint_every == 0
            if validate or save or self.step % _FLUSH_EVERY == 0:
                row = self._flush()
                progress.set_postfix(loss=row["loss"], lr=row["lr"], refresh=False)
            if validate:
                self._evaluate("validation", *self.validation)
            if at_end:
                self._evaluate("test", *self.test)
            if save:
                self._save()
            progress.update()
        progress.close()

    def _train_step(self) -> None:
        row = {"kind": "step", "step": self.step + 1, "epoch": self.step // self.batches.per_epoch}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        batch = self.batches.batch(self.step)
        closure = self.passes.begin(*batch)
        is_seen = isinstance(self.scheduler, AutoLR) and not self._scores_other_images()
        loss = self.scheduler.loss(closure) if is_seen else closure()
        self.passes.backward(loss)
        self.optimizer.step()
        row["loss"] = loss.detach().clone()  # the next replay of a graph writes to the same place
        if isinstance(self.scheduler, AutoLR):
            last_probe, start = self.scheduler.last_probe, mark(self.device)
            self.scheduler.step(None if is_seen else self._closure(*batch))
            if self.scheduler.last_probe is not last_probe:
                row["probe"] = (self.scheduler.last_probe, start, mark(self.device))
        else:
            self.scheduler.step()
        self.log.pending.append(row)
        self.step += 1

    def _passes(self) -> Passes:
        if self.args.step == "captured":
            return Captured(self.model, *self.batches.batch(0), replays_probes=self.args.evaluator == "inplace")
        return Passes(self.model, torch.compile(self.model) if self.args.step == "compiled" else None)

    def _scores_other_images(self) -> bool:
        return self.args.score_batch == "independent" or self.args.score_batch_size is not None

    def _closure(self, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """Return the closure of a probe that is scored on images from elsewhere, or on another number of them."""
        size = self.args.score_batch_size or len(labels)
        kept = 0 if self.args.score_batch == "independent" else min(size, len(labels))

        @cache  # the images are drawn once a probe, and only if there is one
        def scored() -> tuple[Tensor, Tensor]:
            if kept == size:
                return images[:size], labels[:size]
            more_images, more_labels = self.batches.random_batch(self.step, size - kept)
            return torch.cat([images[:kept], more_images]), torch.cat([labels[:kept], more_labels])

        return lambda: loss_of(self.model, *scored())

    def _flush(self) -> dict[str, Any]:
        """Write the pending rows, add their time to the account, and return the last."""
        rows = self.log.flush()
        probing = sum(row["probe"]["seconds"] for row in rows if "probe" in row)
        self.seconds["probing"] += probing
        self.seconds["training"] += self._elapsed() - probing
        return rows[-1]

    @torch.no_grad()
    def _evaluate(self, kind: str, images: Tensor, labels: Tensor) -> None:
        """Log loss and accuracy, with the account of time and memory so far."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            logits = self.model(self.batches.normalize(x))
            loss += F.cross_entropy(logits, y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
        self.model.train()
        row = {"kind": kind, "step": self.step, "epoch": (self.step - 1) // self.batches.per_epoch}
        row |= {"loss": loss.item() / len(labels), "accuracy": correct.item() / len(labels)}
        self.seconds["evaluating"] += self._elapsed()
        self.peak = max(self.peak, _peak_memory(self.device))
        self.log.write(row | {"seconds": self.seconds, "memory": self.peak})

    def _elapsed(self) -> float:
        """Return the seconds since the last call."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    def _header(self, classes: int) -> dict[str, Any]:
        return {
            "kind": "header",
            "command": self.command,
            "args": _plain(self.args),
            **self._surroundings(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "classes": classes,
            "train_images": self.batches.count,
            "validation_images": len(self.validation[1]),
            "test_images": len(self.test[1]),
            "data": self.digest,
            "steps_per_epoch": self.batches.per_epoch,
            "total_steps": self.total_steps,
        }

    def _surroundings(self) -> dict[str, Any]:
        """Return what else the bits of a run may depend on."""
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        cuda = self.device.type == "cuda"
        return {
            "versions": {**versions, "autolr_fast": autolr_fast.__version__},
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.machine(),
            "threads": torch.get_num_threads(),
        }

    def _save(self) -> None:
        content = {
            "args": _plain(self.args),
            "data": self.digest,
            "surroundings": self._surroundings(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": self.seconds,
            "peak": self.peak,
            "log_length": self.log.sync(),
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(content, file)
            os.fsync(file.fileno())
        os.replace(temporary, self.checkpoint)
        self._elapsed()  # saving is neither training nor probing

    def _resume(self) -> Log:
        """Take over what the checkpoint holds, and return the log as it was then."""
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self._check_same_run(saved)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.step, self.seconds, self.peak = saved["step"], saved["seconds"], saved["peak"]
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        return Log(self.args.out / "log.jsonl", saved["log_length"])

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        for name, value in _plain(self.args).items():
            then = saved["args"].get(name)
            if name not in _FREE_ON_RESUME and value != then:
                raise RunError(
                    f"--{name.replace('_', '-')} is {value}, and the run in {self.args.out} was started with "
                    f"{then}: give that to go on with it, or another --out to start a new run"
                )
        if self.digest != saved["data"]:
            raise RunError(
                f"--data {self.args.data} holds images {self.digest[:12]} and the run in {self.args.out} was "
                f"started with {saved['data'][:12]}: give those to go on with it, or another --out to start anew"
            )
        for name, value in self._surroundings().items():
            then = saved["surroundings"][name]
            if value != then:
                print(f"{name}: {value}, before {then}; the run may not go on bit for bit", file=sys.stderr)


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def _make_cuda_deterministic() -> None:
    # cuBLAS reads this when it starts; without it torch refuses to promise the same bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes so far: allocated on a GPU, resident on Linux, else 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident.high_water() if sys.platform == "linux" else 0


def _sizes(args: argparse.Namespace, train: int, test: int) -> tuple[int, int, int]:
    """Return how many images to train on, to validate with and to test on, of as many as there are."""
    validation = max(1, train // 10) if args.validation is None else args.validation
    if validation >= train:
        raise RunError(f"--validation {validation}: there are {train} images; give less, to leave some to train on")
    left = train - validation
    for option, asked, there in (("--limit", args.limit, left), ("--test-limit", args.test_limit, test)):
        if asked is not None and asked > there:
            raise RunError(f"{option} {asked}: there are {there} images; give that or less, or leave it out")
    train, test = args.limit or left, args.test_limit or test
    if args.batch_size > train:
        raise RunError(f"--batch-size {args.batch_size}: there are {train} images to train on; give that or less")
    return train, validation, test
