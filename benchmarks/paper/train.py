"""Trains ResNet-18 on images under one scheduler: logs every step, and survives a kill bit for bit.

``python -m benchmarks.paper.train --data DIR --out DIR --scheduler auto`` runs it, ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from autolr_fast._evaluators import EVALUATORS
from autolr_fast.demo import BASELINES

from .data import DataError
from .log import RunError
from .passes import STEPS
from .rules import RULES
from .run import Run
from .schedulers import FACTORS, PROBING

__all__ = ["CACHE", "COMMAND", "device", "main", "number"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autolr_fast"
"""Where decoded images are kept, unless ``--cache`` says otherwise."""
COMMAND = ("python", "-m", "benchmarks.paper.train")
"""How a run is started; its options follow."""
_OF_A_PROBE = ("factors", "every", "score", "direction", "calibrate", "score_batch", "score_batch_size")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; what is the user's fault ends it with a message and status 2.

    Args:
        argv: the arguments; by default those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    if args.scheduler not in PROBING:
        for name in _OF_A_PROBE:
            if (value := getattr(args, name)) is not None:
                option = name.replace("_", "-")
                parser.error(f"--{option} {value} has no effect on --scheduler {args.scheduler}: leave it out")
    try:
        Run(args, shlex.join([*COMMAND, *argv])).train()
    except (DataError, RunError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from the last checkpoint\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=shlex.join(COMMAND),
        description="Train ResNet-18 under one scheduler. The same command goes on where it was stopped.",
    )
    count = number(int, lowest=1)

    def add(option: str, default: Any, help: str, **how: Any) -> None:
        shown = "" if default is None or "%(default)s" in help else " (%(default)s)"
        parser.add_argument(option, default=default, help=help + shown, **how)

    add("--data", None, "directory with train-*.parquet and test-*.parquet", type=Path, required=True)
    add("--out", None, "directory of log.jsonl and checkpoint.pt", type=Path, required=True)
    add("--scheduler", "auto", "auto is AutoLR, paper is AutoLR.paper", choices=[*PROBING, *BASELINES])
    add("--lr", 0.005, "where the learning rate starts", type=number(float, above=0))
    add(
        "--factors",
        None,
        "of a rule: how many, or 7 that lie further apart (paper 3, auto no rule)",
        choices=FACTORS,
    )
    add("--every", None, "steps from probe to probe, or 'epoch' (auto 10, paper 1)", type=_every)
    add("--score", None, "how a rule's losses become weights (minmax)", choices=RULES)
    add("--direction", None, "of a rule's candidates (step)", choices=("step", "gradient"))
    add("--calibrate", None, "first steps that are all probed (auto 20, paper 0)", type=number(int, lowest=0))
    add("--score-batch", None, "that a probe is scored on (training)", choices=("training", "independent"))
    add(
        "--score-batch-size",
        None,
        "images to score on; more than a batch are drawn in addition (a batch)",
        type=count,
    )
    add("--evaluator", "streamed", "of auto and paper; auto measures, so two runs may differ", choices=EVALUATORS)
    add("--epochs", 100, "what the schedule spans; a last batch that is not full is left out", type=count)
    add("--steps", None, "stop after so many steps in all; the schedule still spans --epochs", type=count)
    add("--batch-size", 32, "images in a batch", type=count)
    add("--momentum", 0.0, "of SGD", type=number(float, lowest=0, below=1))
    add("--weight-decay", 0.0, "of SGD", type=number(float, lowest=0))
    add("--augment", True, "flip, pad by 4 pixels and crop at random", action=argparse.BooleanOptionalAction)
    add("--validation", None, "images at the end of the training set to validate with (a tenth)", type=count)
    add("--limit", None, "train on the first so many of the others only (all)", type=count)
    add("--test-limit", None, "test on the first so many images only (all)", type=count)
    add("--width", 64, "channels of the first stage", type=count)
    add("--seed", 0, "of weights, order and augmentation", type=number(int, lowest=0, below=2**63))
    add("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train", type=device)
    add("--step", "eager", "how forward and backward run; captured replays CUDA graphs", choices=STEPS)
    add(
        "--eval-every", None, "steps from validation to validation (an epoch); the last step is one too", type=count
    )
    add("--checkpoint-every", 500, "steps from checkpoint to checkpoint", type=count)
    add("--cache", CACHE, "directory of the decoded images", type=Path)
    return parser


def number(
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


def _every(text: str) -> int | str:
    if text == "epoch":
        return text
    try:
        return int(number(int, lowest=1)(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or 'epoch'") from error


def device(name: str) -> str:
    """Return a device's name if it can be used here; for argparse."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({reason}); use 'cpu'") from error
    return name


if __name__ == "__main__":
    main()
