"""Trains ResNet-18 on images under one scheduler: logs every step, and survives a kill bit for bit.

``python -m benchmarks.paper.train --data DIR --out DIR --scheduler auto`` runs it, ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

import autolr_fast
from autolr_fast import EVALUATORS, FACTORS_3, FACTORS_5, FACTORS_7, AutoLR, Probe
from autolr_fast.demo import BASELINES

from .data import Batches, DataError, load_dataset
from .models import ResNet18

__all__ = ["main"]

PROBING = ("auto", "paper")
FACTORS = {3: FACTORS_3, 5: FACTORS_5, 7: FACTORS_7}
FREE_ON_RESUME = ("data", "out", "cache", "steps")  # they say where, or until when, but not what is computed
FLUSH_EVERY = 100  # steps


class RunError(Exception):
    """What was asked for cannot be run; says which argument, its value, and what to do."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; what is the user's fault ends it with a message and status 2.

    Args:
        argv: the arguments; by default those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    if args.scheduler not in PROBING:
        for option in ("factors", "every"):
            if (value := getattr(args, option)) is not None:
                parser.error(f"--{option} {value} has no effect on --scheduler {args.scheduler}: leave it out")
    try:
        Run(args, shlex.join(["python", "-m", "benchmarks.paper.train", *argv])).train()
    except (DataError, RunError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from the last checkpoint\n")


class Run:
    """One training, from its first step or from the checkpoint in ``args.out``."""

    def __init__(self, args: argparse.Namespace, command: str):
        self.args = args
        self.command = command
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            _make_cuda_deterministic()

        data = load_dataset(args.data, args.cache)
        train, test = _limits(args, len(data.train_labels), len(data.test_labels))
        train_images, train_labels = data.train_images[:train].to(self.device), data.train_labels[:train]
        self.batches = Batches(
            train_images, train_labels.to(self.device), args.batch_size, args.seed, augment=args.augment
        )
        self.test_images = data.test_images[:test].to(self.device)
        self.test_labels = data.test_labels[:test].to(self.device)
        self.classes, self.digest = data.classes, data.digest
        self.total_steps = args.epochs * self.batches.per_epoch
        self.last_step = min(args.steps or self.total_steps, self.total_steps)

        torch.manual_seed(args.seed)
        self.model = ResNet18(data.classes, args.width).to(self.device)
        self.optimizer = SGD(
            self.model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
        )
        self.scheduler = self._scheduler()
        self.step = 0
        self.seconds = {"training": 0.0, "probing": 0.0, "evaluating": 0.0}

        args.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = args.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.log = self._resume()
        else:
            self.log = Log(args.out / "log.jsonl", length=0)
            self.log.write(self._header())

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
            evaluate = at_end or self.step % (self.args.eval_every or self.batches.per_epoch) == 0
            save = at_end or self.step % self.args.checkpoint_every == 0
            if evaluate or save or self.step % FLUSH_EVERY == 0:
                row = self._flush()
                progress.set_postfix(loss=row["loss"], lr=row["lr"], refresh=False)
            if evaluate:
                self._evaluate()
            if save:
                self._save()
            progress.update()
        progress.close()

    def _train_step(self) -> None:
        row = {"kind": "step", "step": self.step + 1, "epoch": self.step // self.batches.per_epoch}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        x, y = self.batches.batch(self.step)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        row["loss"] = loss.detach()
        if isinstance(self.scheduler, AutoLR):
            last_probe, start = self.scheduler.last_probe, _mark(self.device)
            self.scheduler.step(lambda: F.cross_entropy(self.model(x), y))
            if self.scheduler.last_probe is not last_probe:
                row["probe"] = (self.scheduler.last_probe, start, _mark(self.device))
        else:
            self.scheduler.step()
        self.log.pending.append(row)
        self.step += 1

    def _flush(self) -> dict[str, Any]:
        """Write the pending rows, add their time to the account, and return the last."""
        rows = self.log.flush()
        probing = sum(row["probe"]["seconds"] for row in rows if "probe" in row)
        self.seconds["probing"] += probing
        self.seconds["training"] += self._elapsed() - probing
        return rows[-1]

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in zip(self.test_images.split(500), self.test_labels.split(500), strict=True):
            logits = self.model(self.batches.normalize(x))
            loss += F.cross_entropy(logits, y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
        self.model.train()
        row = {"kind": "eval", "step": self.step, "epoch": (self.step - 1) // self.batches.per_epoch}
        row["test_loss"] = loss.item() / len(self.test_labels)
        row["test_accuracy"] = correct.item() / len(self.test_labels)
        self.seconds["evaluating"] += self._elapsed()
        self.log.write(row | {"seconds": self.seconds})

    def _elapsed(self) -> float:
        """Return the seconds since the last call."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    def _scheduler(self) -> LRScheduler:
        args = self.args
        if args.scheduler not in PROBING:
            return BASELINES[args.scheduler](self.optimizer, self.total_steps)
        chosen: dict[str, Any] = {"evaluator": args.evaluator}
        if args.every is not None:
            chosen["every"] = args.every
        if args.factors is not None:
            chosen["factors"] = FACTORS[args.factors]
        try:
            if args.scheduler == "paper":
                return AutoLR.paper(self.optimizer, self.model, **chosen)
            return AutoLR(self.optimizer, self.model, total_steps=self.total_steps, **chosen)
        except ValueError as error:
            raise RunError(f"--scheduler {args.scheduler}: {error}") from error

    def _header(self) -> dict[str, Any]:
        return {
            "kind": "header",
            "command": self.command,
            "args": _plain(self.args),
            **self._surroundings(),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "classes": self.classes,
            "train_images": self.batches.count,
            "test_images": len(self.test_labels),
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
        self.step, self.seconds = saved["step"], saved["seconds"]
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        return Log(self.args.out / "log.jsonl", saved["log_length"])

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        for name, value in _plain(self.args).items():
            then = saved["args"].get(name)
            if name not in FREE_ON_RESUME and value != then:
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


class Log:
    """A file of JSON lines.

    Rows of steps wait in ``pending`` with their tensors, so that no step waits for its own loss.

    Args:
        path: of the file; made if it does not exist.
        length: bytes to keep of it.

    Raises:
        RunError: if it is shorter.
    """

    def __init__(self, path: Path, length: int):
        self.pending: list[dict[str, Any]] = []
        self._path = path
        path.touch()
        size = path.stat().st_size
        if size < length:
            raise RunError(
                f"{path} is {size} bytes long and was {length} when the checkpoint beside it was made: put back "
                "what was removed, or give another --out to start a new run"
            )
        os.truncate(path, length)

    def write(self, *rows: dict[str, Any]) -> None:
        """Write rows of plain values; numbers that are not finite become null."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)

    def flush(self) -> list[dict[str, Any]]:
        """Write the pending rows, of which there must be one, and return them."""
        rows, self.pending = self.pending, []
        losses = torch.stack([row["loss"] for row in rows]).tolist()
        for row, loss in zip(rows, losses, strict=True):
            row["loss"] = loss
            if "probe" in row:
                probe, start, end = row["probe"]
                row["probe"] = _probe_row(probe) | {"seconds": _seconds(start, end)}
        self.write(*rows)
        return rows

    def sync(self) -> int:
        """Bring what was written to the disk, and return its length in bytes."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def _probe_row(probe: Probe) -> dict[str, Any]:
    """Return the probe in plain values; there is one param group, and so one learning rate."""
    return {
        "step": probe.step,
        "window": probe.window,
        "factors": list(probe.factors),
        "losses": probe.losses.tolist(),
        "weights": probe.weights.tolist(),
        "factor": probe.factor.item(),
        "lr_before": probe.lr_before[0],
        "lr_after": probe.lr_after[0],
        "evaluator": probe.evaluator,
        "rounds": probe.rounds,
    }


def _mark(device: torch.device) -> float | torch.cuda.Event:
    """Return a point in the device's time; on a GPU without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    return end - start


def _finite(value: Any) -> Any:
    """Return the value with None for every float that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def _make_cuda_deterministic() -> None:
    # cuBLAS reads this when it starts; without it torch refuses to promise the same bits.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def _limits(args: argparse.Namespace, train: int, test: int) -> tuple[int, int]:
    """Return how many images to train on and to test on, of as many as there are."""
    for option, asked, there in (("--limit", args.limit, train), ("--test-limit", args.test_limit, test)):
        if asked is not None and asked > there:
            raise RunError(f"{option} {asked}: there are {there} images; give that or less, or leave it out")
    train, test = args.limit or train, args.test_limit or test
    if args.batch_size > train:
        raise RunError(f"--batch-size {args.batch_size}: there are {train} images to train on; give that or less")
    return train, test


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.train",
        description="Train ResNet-18 under one scheduler. The same command goes on where it was stopped.",
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autolr_fast"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = _number(int, lowest=1)

    def add(option: str, default: Any, help: str, **how: Any) -> None:
        shown = "" if default is None or "%(default)s" in help else " (%(default)s)"
        parser.add_argument(option, default=default, help=help + shown, **how)

    add("--data", None, "directory with train-*.parquet and test-*.parquet", type=Path, required=True)
    add("--out", None, "directory of log.jsonl and checkpoint.pt", type=Path, required=True)
    add("--scheduler", "auto", "auto is AutoLR, paper is AutoLR.paper", choices=[*PROBING, *BASELINES])
    add("--lr", 0.005, "where the learning rate starts", type=_number(float, above=0))
    add("--factors", None, "how many factors a probe of auto or paper has (3)", type=int, choices=FACTORS)
    add("--every", None, "steps from probe to probe (auto 10, paper 1)", type=count)
    add("--evaluator", "streamed", "of auto and paper; auto measures, so two runs may differ", choices=EVALUATORS)
    add("--epochs", 100, "what the schedule spans; a last batch that is not full is left out", type=count)
    add("--steps", None, "stop after so many steps in all; the schedule still spans --epochs", type=count)
    add("--batch-size", 32, "images in a batch", type=count)
    add("--momentum", 0.0, "of SGD", type=_number(float, lowest=0, below=1))
    add("--weight-decay", 0.0, "of SGD", type=_number(float, lowest=0))
    add("--augment", True, "flip, pad by 4 pixels and crop at random", action=argparse.BooleanOptionalAction)
    add("--limit", None, "train on the first so many images only (all)", type=count)
    add("--test-limit", None, "test on the first so many images only (all)", type=count)
    add("--width", 64, "channels of the first stage", type=count)
    add("--seed", 0, "of weights, order and augmentation", type=_number(int, lowest=0, below=2**63))
    add("--device", device, "where to train", type=_device)
    add("--eval-every", None, "steps from test to test (an epoch); the last step is tested too", type=count)
    add("--checkpoint-every", 500, "steps from checkpoint to checkpoint", type=count)
    add("--cache", cache, "directory of the decoded images", type=Path)
    return parser


def _number(
    kind: type[int] | type[float], lowest: int = 0, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """Return a parser of numbers ``x`` with ``x >= lowest`` and ``above < x < below``."""
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" of at least {lowest}" if above < lowest else f" above {above}"
    wanted += f" and below {below}" if below < math.inf else ""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value >= lowest and above < value < below):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used; give {wanted}")
        return value

    return parse


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({reason}); use 'cpu'") from error
    return name


if __name__ == "__main__":
    main()
