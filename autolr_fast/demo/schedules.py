"""The demonstration: schedules that need the right learning rate, and one that finds it.

A small convolutional network learns scikit-learn's digits, from learning rates spread over four decades, under
each schedule. Needs ``pip install 'autolr_fast[demo]'``.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, StepLR

from ..plotting import Curve, plot, plot_runs
from ..scheduler import AutoLR

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = [
    "BASELINES",
    "Digits",
    "Run",
    "describe",
    "evaluate",
    "load_digits",
    "main",
    "network",
    "table",
    "train",
    "write",
]

BASELINES: Mapping[str, Callable[[Optimizer, int], LRScheduler]] = {
    "constant": lambda optimizer, total: ConstantLR(optimizer, factor=1.0),
    "linear": lambda optimizer, total: LinearLR(optimizer, 1.0, 0.0, total_iters=total),
    "cosine": lambda optimizer, total: CosineAnnealingLR(optimizer, T_max=total),
    "step": lambda optimizer, total: StepLR(optimizer, step_size=math.ceil(total / 3), gamma=0.1),
}
"""torch's schedules over a total number of optimizer steps; "step" is a tenth at each third."""

# The evaluator is named: what "auto" chooses by measuring, and with it the rounding, may change from run to run.
_PROBING: Mapping[str, Callable[[Optimizer, nn.Module, int], AutoLR]] = {
    "AutoLR.paper": lambda optimizer, model, total: AutoLR.paper(optimizer, model, evaluator="inplace"),
    "AutoLR": lambda optimizer, model, total: AutoLR(optimizer, model, total_steps=total, evaluator="inplace"),
}
_SCHEDULES = (*BASELINES, *_PROBING)
_OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adamw": torch.optim.AdamW,
}
_BATCH_SIZE = 32
_VALIDATE_EVERY = 10  # optimizer steps


class Digits(NamedTuple):
    """Images [M, 1, 8, 8] float32 in 0 .. 1 and labels [M] int64: 60 % to train on, 20 % each for the rest."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Run(NamedTuple):
    """One training and what came of it.

    Attributes:
        curve: learning rate and validation loss over the optimizer steps.
        lr0: where the learning rate started.
        lr_halfway: the learning rate at half of the training.
        accuracy: on the test images at the end, 0 to 1.
        loss: mean cross-entropy of the test images at the end.
        seconds: of training, probes included, validation not.
        overhead: seconds spent in ``scheduler.step`` over the others.
        scheduler: as it was at the end.
    """

    curve: Curve
    lr0: float
    lr_halfway: float
    accuracy: float
    loss: float
    seconds: float
    overhead: float
    scheduler: LRScheduler


def main(args: argparse.Namespace) -> None:
    """Train every combination, print the table, write the pictures: of all runs, and of one by AutoLR.

    Args:
        args: what ``python -m autolr_fast demo --help`` lists.

    Raises:
        ImportError: if an extra is missing; says which and how to install it.
    """
    from tqdm import tqdm  # noqa: PLC0415, an optional dependency

    digits = load_digits(args.seed)
    per_epoch = len(digits.train[1]) // _BATCH_SIZE
    total = args.epochs * per_epoch
    combinations = [(schedule, lr) for lr in args.lr for schedule in _SCHEDULES]
    runs = []
    with tqdm(total=len(combinations) * total, unit="step", mininterval=0.2) as progress:
        for schedule, lr in combinations:
            progress.set_description(f"{schedule} from {lr:g}", refresh=False)
            setting = {"optimizer": args.optimizer, "lr": lr, "total_steps": total, "seed": args.seed}
            runs.append(train(digits, schedule, **setting, progress=progress.update))

    command, machine = describe(args)
    text = f"{table(runs)}\n\n`{command}` ({machine})\n"
    print(text)
    figure = plot_runs(
        sorted((run.curve for run in runs), key=lambda curve: _SCHEDULES.index(curve.label)),
        title=f"A small network on digits, {args.optimizer.upper()}, from {len(args.lr)} learning rates",
        footer=f"{command}   ({machine})",
    )
    write(args.out, figure, text)
    middle = sorted(args.lr)[len(args.lr) // 2]
    scheduler = next(run.scheduler for run in runs if run.curve.label == "AutoLR" and run.lr0 == middle)
    assert isinstance(scheduler, AutoLR)
    title = f"AutoLR on digits, {args.optimizer.upper()}, from a learning rate of {middle:g}"
    figure = plot(scheduler, title=title, footer=f"{command}   ({machine})")
    _save(figure, args.out.with_stem(f"{args.out.stem}_run"))


def describe(args: argparse.Namespace) -> tuple[str, str]:
    """Return the command line that does the same again, and what it runs on."""
    command = "python -m autolr_fast demo" + " --tree" * args.tree
    command += f" --optimizer {args.optimizer} --epochs {args.epochs} --seed {args.seed}"
    command += " --lr " + " ".join(f"{lr:g}" for lr in args.lr)
    threads = torch.get_num_threads()
    return command, f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def write(out: Path, figure: Figure, text: str) -> None:
    """Write a picture, and a text beside it as .md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, out)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"wrote {out.with_suffix('.md')}")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def load_digits(seed: int) -> Digits:
    """Return scikit-learn's 1,797 handwritten digits, shuffled by ``seed``."""
    from sklearn import datasets  # noqa: PLC0415, an optional dependency

    bunch = datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)[order]
    sizes = [len(labels) * 3 // 5, len(labels) // 5]
    sizes.append(len(labels) - sum(sizes))
    return Digits(*zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True))


def network() -> nn.Sequential:
    """Return a convolutional network with BatchNorm, [B, 1, 8, 8] -> logits [B, 10]; 24,058 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(
    digits: Digits,
    schedule: str,
    *,
    optimizer: str,
    lr: float,
    total_steps: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> Run:
    """Train one network under one schedule.

    Args:
        digits: what to learn.
        schedule: a name in :data:`BASELINES`, ``"AutoLR"`` or ``"AutoLR.paper"``.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"``.
        lr: where the learning rate starts.
        total_steps: optimizer steps.
        seed: of the weights and the order of the images; the same for all schedules.
        progress: called after every optimizer step.
    """
    torch.manual_seed(seed)
    model = network()
    optim = _OPTIMIZERS[optimizer](model.parameters(), lr=lr)
    scheduler: LRScheduler
    if schedule in _PROBING:
        scheduler = _PROBING[schedule](optim, model, total_steps)
    else:
        scheduler = BASELINES[schedule](optim, total_steps)

    steps, lrs, losses = [0], [lr], [evaluate(model, *digits.validation)[0]]
    training = scheduling = 0.0
    for step in range(1, total_steps + 1):
        start = time.perf_counter()
        x, y = _batch(digits.train, step - 1, seed)
        closure = partial(_loss, model, x, y)
        optim.zero_grad()
        loss = scheduler.loss(closure) if isinstance(scheduler, AutoLR) else closure()
        loss.backward()  # type: ignore[no-untyped-call]
        optim.step()
        stepped = time.perf_counter()
        scheduler.step()
        training += stepped - start
        scheduling += time.perf_counter() - stepped
        if step % _VALIDATE_EVERY == 0 or step == total_steps:
            steps.append(step)
            lrs.append(optim.param_groups[0]["lr"])
            losses.append(evaluate(model, *digits.validation)[0])
        progress()

    test_loss, accuracy = evaluate(model, *digits.test)
    return Run(
        Curve(schedule, steps, lrs, losses),
        lr0=lr,
        lr_halfway=lrs[len(lrs) // 2],
        accuracy=accuracy,
        loss=test_loss,
        seconds=training + scheduling,
        overhead=scheduling / training,
        scheduler=scheduler,
    )


def table(runs: Sequence[Run]) -> str:
    """Return the runs as a Markdown table, with the worst start of each schedule under it."""
    rows = ["| lr0 | schedule | test accuracy | test loss | lr halfway | time | overhead |", "|---" * 7 + "|"]
    rows += [
        f"| {run.lr0:g} | {run.curve.label} | {run.accuracy:.1%} | {run.loss:.3f} | {run.lr_halfway:.2g} "
        f"| {run.seconds:.2f} s | {run.overhead:.1%} |"
        for run in runs
    ]
    worst: dict[str, float] = {}
    for run in runs:
        worst[run.curve.label] = min(run.accuracy, worst.get(run.curve.label, 1.0))
    summary = ", ".join(f"{label} {accuracy:.1%}" for label, accuracy in worst.items())
    return "\n".join([*rows, "", f"Worst of the starts: {summary}."])


def _batch(examples: tuple[Tensor, Tensor], step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a step; the order is new in every epoch."""
    images, labels = examples
    epoch, index = divmod(step, len(labels) // _BATCH_SIZE)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    chosen = order[index * _BATCH_SIZE : (index + 1) * _BATCH_SIZE]
    return images[chosen], labels[chosen]


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy of a model that is being trained."""
    model.eval()
    logits = model(images)
    model.train()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()
