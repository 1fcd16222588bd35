"""``python -m autolr_fast demo --tree``: the demonstration's network, by a search over learning rates.

It learns the digits from all of the learning rates at once, and the best branches of every epoch go on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from .._tree import ALRTree, Epoch
from ..plotting import plot_tree
from .schedules import Digits, describe, evaluate, load_digits, network, write

__all__ = ["main", "search"]

_BATCH_SIZE = 32
# As torch.optim.SGD(momentum=0.9) and torch.optim.AdamW() of the other demonstration.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "adamw": {"weight_decay": 0.01},
}


def main(args: argparse.Namespace) -> None:
    """Search, print the table, write the picture.

    Args:
        args: what ``python -m autolr_fast demo --help`` lists.

    Raises:
        ImportError: if an extra is missing.
    """
    digits = load_digits(args.seed)
    lines = ["| epoch | branches | lr of the best | its training loss | validation accuracy |", "|---" * 5 + "|"]
    print("\n".join(lines))

    def tell(epoch: Epoch, accuracy: float) -> None:
        best = epoch.best
        row = f"| {epoch.number} | {len(epoch.branches)} | {best.lr:.3g} | {best.loss:.4f} | {accuracy:.1%} |"
        lines.append(row)
        print(row)

    start = time.perf_counter()
    tree = search(digits, args.lr, optimizer=args.optimizer, epochs=args.epochs, seed=args.seed, tell=tell)
    seconds = time.perf_counter() - start
    accuracy = evaluate(tree.best_model(), *digits.test)[1]
    lines += ["", f"Test accuracy of the best model {accuracy:.1%}, after {seconds:.1f} s.", ""]
    print("\n".join(lines[-3:]))
    command, machine = describe(args)
    figure = plot_tree(
        tree.history,
        title=f"A search over learning rates on digits, {args.optimizer.upper()}, from {len(args.lr)} of them",
        footer=f"{command}   ({machine})",
    )
    write(args.out, figure, "\n".join([*lines, f"`{command}` ({machine})", ""]))


def search(
    digits: Digits,
    lrs: Sequence[float],
    *,
    optimizer: str,
    epochs: int,
    seed: int,
    tell: Callable[[Epoch, float], object] = lambda epoch, accuracy: None,
) -> ALRTree:
    """Return a search that has ended.

    Args:
        digits: what to learn.
        lrs: where to start.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adamw"``.
        epochs: how many to train.
        seed: of the weights and the order of the images.
        tell: called with each epoch and the validation accuracy of its best model.
    """
    torch.manual_seed(seed)
    model, generator = network(), torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*digits.train), _BATCH_SIZE, shuffle=True, generator=generator)
    # The method is named: what "auto" chooses by measuring, and with it the rounding, may change from run to run.
    tree = ALRTree(
        model,
        F.cross_entropy,
        lrs,
        optimizer=optimizer,
        optimizer_options=_OPTIONS[optimizer],
        method="batched",
        generator=generator,
    )
    tree.fit(loader, epochs, lambda epoch: tell(epoch, evaluate(model, *digits.validation)[1]))
    return tree
