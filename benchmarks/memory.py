"""How much memory a probe takes: ``python -m benchmarks.memory`` writes ``results/memory.md``.

On a GPU, where there is one, that is torch's count of what is allocated; on a CPU the resident memory of the
process, and every row is measured in one of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autolr_fast import FACTORS_7, AutoLR
from autolr_fast._evaluators import EVALUATORS, EvaluatorError

from . import device, resident
from .baselines import BASELINES
from .device import DEVICE
from .problems import SEED, Problem, make_problem
from .report import write_now

__all__ = ["Seen", "about", "main", "measure", "measure_apart", "watch"]

MODELS = ("wide mlp", "resnet18")
FACTORS = FACTORS_7
TRAININGS = ("plain training", "training with AutoLR")
_STEPS = 6
_CLEAR = Path("/proc/self/clear_refs")
_RESETS = os.access(_CLEAR, os.W_OK)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all rows and write them, or print one.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Measure the memory of probes, and write the tables."
    )
    add = parser.add_argument
    add(
        "row", nargs="*", metavar="MODEL WHAT", help="measure this row alone, in this process, and print it as JSON"
    )
    row = parser.parse_args(argv).row
    if row:
        if len(row) != 2:
            parser.error(f"{' '.join(row)}: expected a model and what is measured, or nothing")
        warnings.simplefilter("ignore")  # auto says what it cannot use
        print(json.dumps(measure(*row)))
        return
    rows = []
    for model in MODELS:
        for what in ("snapshot", *EVALUATORS, *BASELINES, *TRAININGS):
            rows.append(measure_apart("benchmarks.memory", model, what))
            print(*(f"{name}={value}" for name, value in rows[-1].items() if name not in about()))
    write_now("memory", rows)


def measure_apart(module: str, *arguments: str | int) -> dict[str, Any]:
    """Return the row of a module's ``measure``; on a CPU the module is run by itself, and prints it as JSON."""
    row: dict[str, Any]
    if DEVICE == "cuda":
        row = importlib.import_module(module).measure(*arguments)
        return row
    # Blocks must go back to the system when they are freed: the resident memory would not tell otherwise.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    row = json.loads(done.stdout)
    return row


def measure(model: str, what: str) -> dict[str, Any]:
    """Measure one row in this process.

    Args:
        model: a name in :data:`~benchmarks.problems.PROBLEMS`.
        what: ``"snapshot"``, an evaluator, a baseline or a training.

    Returns:
        Sizes in units of the parameters: of a probe ``first``, ``later`` and ``kept``; of a training its ``peak``;
        a ``reason`` instead, if the evaluator refuses.
    """
    problem = make_problem(model, DEVICE)
    size = sum(now.numel() * now.element_size() for now in problem.now)
    row = {"model": model, "what": what, "parameter_bytes": size, "n": len(FACTORS), **about()}
    problem.forwards(2)
    if what == "snapshot":
        taken: list[list[torch.Tensor]] = []
        seen = watch(lambda: taken.append([p.detach().clone() for p in problem.model.parameters()]))
        return {**row, "kept": (seen.after - seen.before) / size}
    if what in TRAININGS:
        seen = watch(lambda: train(problem, probing=what != TRAININGS[0]))
        return {**row, "peak": (seen.peak - seen.before) / size}

    run, evaluator = (lambda: BASELINES[what](problem, FACTORS)), None
    if what in EVALUATORS:
        evaluator, line = EVALUATORS[what](), problem.line()
        run = lambda: evaluator.losses(problem.model, line, FACTORS, problem.closure).tolist()  # noqa: E731
    plain = watch(lambda: problem.forwards(len(FACTORS)))
    try:
        first = watch(run)
    except EvaluatorError as error:
        return {**row, "reason": error.reason}
    later = watch(run)
    return {
        **row,
        "ran": evaluator.name if evaluator else what,
        "first": (first.peak - plain.peak) / size,
        "later": (later.peak - plain.peak) / size,
        "kept": (later.after - plain.after) / size,
    }


class Seen(NamedTuple):
    """Bytes in use before and after a call, and the most within it."""

    before: int
    peak: int
    after: int


def watch(run: Callable[[], Any]) -> Seen:
    """Run something and say what memory it took."""
    gc.collect()
    before = _in_use()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _RESETS:
        _CLEAR.write_text("5", encoding="utf-8")  # the high-water mark goes down to what is in use
    run()
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident.high_water()
    gc.collect()
    return Seen(before, peak, _in_use())


def train(problem: Problem, probing: bool) -> None:
    """Train a few steps, all of them probed if AutoLR is there."""
    scheduler = AutoLR(problem.optimizer, problem.model) if probing else None
    for _ in range(_STEPS):
        problem.train(scheduler)


def _in_use() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else resident.in_use()


def about() -> dict[str, Any]:
    """Return how it was measured, and where."""
    counted = "allocated by torch" if DEVICE == "cuda" else "resident"
    if DEVICE == "cpu" and not _RESETS:
        counted += (
            "; /proc/self/clear_refs cannot be written, so that peaks below that of a training step are unseen"
        )
    return {
        "memory": counted,
        **device.about(),
        "seed": SEED,
    }


if __name__ == "__main__":
    main()
