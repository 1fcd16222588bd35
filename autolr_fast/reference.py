"""The source's loop as it is written there: deep copies, N forward and backward passes. Slow and obvious.

Kim & Yu, "Automated learning rate scheduling with in-training information", Algorithm 1. It is the oracle of
the tests and the baseline of the benchmarks, and shares no code with the package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["candidate_losses", "next_lr", "propose_lr"]

Loss = Callable[[nn.Module], Tensor]
"""The scalar loss of a model on one batch."""


def propose_lr(
    model: nn.Module,
    loss: Loss,
    lr: float,
    factors: Sequence[float] = (2.0, 1.0, 0.5),
    probe_loss: Loss | None = None,
) -> float:
    """Return the next learning rate: :func:`next_lr` of the :func:`candidate_losses`.

    Args:
        model: left untouched.
        loss: gives the gradient of each candidate.
        lr: learning rate that the factors scale.
        factors: N positive numbers.
        probe_loss: L(theta', B), evaluated at each candidate; by default ``loss`` itself.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> round(propose_lr(model, lambda m: m.weight.square().sum(), lr=0.1), 4)
        0.1259
    """
    return next_lr(candidate_losses(model, loss, lr, factors, probe_loss), lr, factors)


def candidate_losses(
    model: nn.Module,
    loss: Loss,
    lr: float,
    factors: Sequence[float],
    probe_loss: Loss | None = None,
) -> list[float]:
    """Return L(theta - f * lr * grad) for each factor; arguments as in :func:`propose_lr`."""
    losses = []
    for factor in factors:
        with torch.random.fork_rng():  # every candidate sees the same dropout masks
            candidate = copy.deepcopy(model)
            candidate.zero_grad()
            loss(candidate).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for theta in candidate.parameters():
                if theta.grad is not None:
                    theta.sub_(factor * lr * theta.grad)
        with torch.random.fork_rng(), torch.no_grad():
            losses.append((probe_loss or loss)(candidate).item())
    return losses


def next_lr(losses: Sequence[float], lr: float, factors: Sequence[float]) -> float:
    """Return ``lr * prod_n f_n ** (w_n / sum w)`` with ``w = exp(-x)`` of the min-max normalised losses.

    Example:
        >>> round(next_lr([0.9, 1.0, 1.2], lr=1.0, factors=[2.0, 1.0, 0.5]), 3)
        1.234
    """
    low, high = min(losses), max(losses)
    weights = [math.exp(-(value - low) / (high - low)) for value in losses]
    total = sum(weights)
    for factor, weight in zip(factors, weights, strict=True):
        lr *= factor ** (weight / total)
    return lr
