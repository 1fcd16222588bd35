"""The memory of a search over learning rates: ``python -m benchmarks.tree_memory MODEL BEAMS FACTORS METHOD``.

Prints one row as JSON, measured in this process; ``benchmarks/test_tree.py`` runs it for each of its own.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from autolr_fast import ALRTree, reference

from .device import DEVICE
from .memory import about, watch
from .problems import PROBLEMS, make_problem

__all__ = ["FACTORS", "SEQUENTIAL", "main", "measure"]

SEQUENTIAL = "one after another"
FACTORS = {3: (2.0, 1.0, 0.5), 5: (4.0, 2.0, 1.0, 0.5, 0.25), 7: (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)}
_EPOCHS, _LR = 2, 1e-6  # at a rate that leaves every branch finite


def measure(model: str, beams: int, factors: int, method: str) -> dict[str, Any]:
    """Measure two epochs of one batch, plain SGD.

    Args:
        model: a name in :data:`~benchmarks.problems.PROBLEMS`.
        beams: M.
        factors: N.
        method: of :class:`~autolr_fast.ALRTree`, or :data:`SEQUENTIAL`, the reference.

    Returns:
        Sizes in units of the parameters: the ``peak`` over what there was before, the ``activations`` of one model,
        which are the peak of a forward and backward less its gradients; and what ``ran``.
    """
    problem = make_problem(model, DEVICE)
    size = sum(now.numel() * now.element_size() for now in problem.now)
    parameters = list(problem.model.parameters())
    problem.optimizer.zero_grad()
    problem.optimizer.state.clear()
    torch.autograd.grad(problem.closure(), parameters)
    alone = watch(lambda: torch.autograd.grad(problem.closure(), parameters))
    row = {"activations": max(0.0, (alone.peak - alone.before) / size - 1.0)}
    batches = [problem.batch]
    if method == SEQUENTIAL:
        search = (problem.model, problem.loss_fn, [_LR], batches, _EPOCHS)
        seen = watch(lambda: reference.tree_search(*search, beams=beams, factors=FACTORS[factors]))
        ran = method
    else:
        tree = ALRTree(problem.model, problem.loss_fn, _LR, beams=beams, factors=FACTORS[factors], method=method)
        seen = watch(lambda: tree.fit(batches, _EPOCHS))
        ran = tree.method
    return {**row, "peak": (seen.peak - seen.before) / size, "ran": ran, **about()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tree_memory", description="Measure the memory of a search; print it as JSON."
    )
    parser.add_argument("model", choices=PROBLEMS)
    parser.add_argument("beams", type=int, help="M")
    parser.add_argument("factors", type=int, choices=FACTORS, help="N")
    parser.add_argument("method", choices=("auto", "batched", "sequential", SEQUENTIAL))
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # auto says what it cannot use
    print(json.dumps(measure(args.model, args.beams, args.factors, args.method)))


if __name__ == "__main__":
    main()
