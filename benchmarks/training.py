"""What AutoLR adds to a training: ``python -m benchmarks.training`` writes ``results/training.md``.

A GPU is used where there is one, else the models that train in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from autolr_fast import AutoLR

from .device import DEVICE, about, wait
from .problems import SEED, make_problem
from .report import write_now

__all__ = ["main"]

MODELS = ("mlp", "convnet", "resnet18", "transformer") if DEVICE == "cuda" else ("mlp", "convnet")
OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.01),
    "momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: AdamW(parameters, lr=1e-3),
}
_WARM_UP = 5  # steps
_CALLS = 20_000  # of a loss


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all rows, and write them.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of each training (500)")
    steps = parser.parse_args(argv).steps
    torch.set_flush_denormal(True)  # one batch is soon learned, and what is left of its gradients slow to compute
    rows = []
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            rows.append(measure(model, optimizer, steps))
            print(*(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
            write_now("training", rows)  # what was measured stays if this is stopped


def measure(model: str, optimizer: str, steps: int) -> dict[str, Any]:
    """Train with a cosine schedule, with AutoLR, and with the schedule again: the machine's speed drifts."""
    before, (seconds, evaluator), after = (train(model, optimizer, steps, auto) for auto in (False, True, False))
    plain, through = loss_between_probes(model, optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "steps": steps,
        "cosine_ms": 1e3 * statistics.mean((before[0], after[0])) / steps,
        "ms": 1e3 * seconds / steps,
        "evaluator": evaluator,
        "closure_us": 1e6 * plain,
        "loss_us": 1e6 * through,
        **about(),
        "seed": SEED,
    }


def train(model: str, optimizer: str, steps: int, auto: bool) -> tuple[float, str]:
    """Train from the same start on one batch, which costs what any does; return seconds, and what evaluated."""
    problem = make_problem(model, DEVICE)
    for _ in range(_WARM_UP):
        problem.closure().backward()
    optim = OPTIMIZERS[optimizer](problem.model.parameters())
    auto_lr = AutoLR(optim, problem.model, total_steps=steps) if auto else None
    scheduler = auto_lr or CosineAnnealingLR(optim, steps)
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        optim.zero_grad()
        loss = auto_lr.loss(problem.closure) if auto_lr else problem.closure()
        loss.backward()
        optim.step()
        scheduler.step()
    wait()
    return time.perf_counter() - start, auto_lr.evaluator.name if auto_lr else ""


def loss_between_probes(model: str, optimizer: str) -> tuple[float, float]:
    """Return the seconds of a closure that has its loss already, and of ``scheduler.loss`` between probes."""
    problem = make_problem(model, DEVICE)
    optim = OPTIMIZERS[optimizer](problem.model.parameters())
    scheduler = AutoLR(optim, problem.model, calibration_steps=0, probe_every_steps=10)
    loss = problem.closure()

    def closure() -> Tensor:
        return loss

    seconds = []
    for call in (closure, lambda: scheduler.loss(closure)):
        wait()
        seconds.append(min(timeit.repeat(call, number=_CALLS, repeat=5)) / _CALLS)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    main()
