"""The scheduler that a command line asks for."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autolr_fast import FACTORS_3, FACTORS_5, FACTORS_7, AutoLR, Rule
from autolr_fast.demo import BASELINES

from .log import RunError
from .rules import RULES

__all__ = ["FACTORS", "PROBING", "scheduler"]

PROBING = ("auto", "paper")
FACTORS = {"3": FACTORS_3, "5": FACTORS_5, "7": FACTORS_7, "wide": (64.0, 16.0, 4.0, 1.0, 1 / 4, 1 / 16, 1 / 64)}


def scheduler(
    args: argparse.Namespace, optimizer: Optimizer, model: nn.Module, total_steps: int, steps_per_epoch: int
) -> LRScheduler:
    """Return a baseline, ``AutoLR.paper``, or ``AutoLR`` with its defaults; what is asked for differs from these.

    Args:
        args: what ``python -m benchmarks.paper.train --help`` lists.
        optimizer: whose learning rate is moved.
        model: that is trained.
        total_steps: of the whole training.
        steps_per_epoch: of it.

    Raises:
        RunError: if AutoLR refuses that.
    """
    if args.scheduler not in PROBING:
        return BASELINES[args.scheduler](optimizer, total_steps)
    chosen: dict[str, Any] = {"evaluator": args.evaluator}
    if args.every is not None:
        chosen["probe_every_steps"] = steps_per_epoch if args.every == "epoch" else args.every
    if args.calibrate is not None:
        chosen["calibration_steps"] = args.calibrate
    rule: dict[str, Any] = {}
    if args.factors is not None:
        rule["factors"] = FACTORS[args.factors]
    if args.score is not None:
        rule["normalize"], rule["score"] = RULES[args.score]
    if args.direction is not None:
        rule["direction"] = args.direction
    try:
        if args.scheduler == "paper":
            return AutoLR.paper(optimizer, model, rule=Rule(**{"factors": FACTORS_3, **rule}), **chosen)
        if rule:
            chosen["rule"] = Rule(**rule)
        return AutoLR(optimizer, model, total_steps=total_steps, **chosen)
    except ValueError as error:
        raise RunError(f"--scheduler {args.scheduler}: {error}") from error
