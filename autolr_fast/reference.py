"""Run the source's loops as they are written there: deep copies, one after another, slow and obvious.

The loops are those of Kim & Yu, "Automated learning rate scheduling with in-training information": Algorithm 1, and
the technique of its background. That technique is an adaptive learning-rate tree (Takase, Oyama & Kurihara). They
are the oracles of the tests and the baselines of the benchmarks, and share no code with the package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Beam", "candidate_losses", "next_lr", "propose_lr", "tree_search"]

Loss = Callable[[nn.Module], Tensor]
"""The scalar loss of a model on one batch."""


def propose_lr(
    model: nn.Module,
    loss: Loss,
    lr: float,
    factors: Sequence[float] = (2.0, 1.0, 0.5),
    probe_loss: Loss | None = None,
) -> float:
    """Return the next learning rate: `next_lr` of the `candidate_losses`.

    Args:
        model: left untouched.
        loss: gives the gradient of each candidate.
        lr: learning rate that the factors scale.
        factors: N positive numbers.
        probe_loss: L(theta', B), evaluated at each candidate; by default ``loss`` itself.

    Examples:
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
    """Return L(theta - f * lr * grad) for each factor.

    Args:
        model: left untouched.
        loss: gives the gradient of each candidate.
        lr: learning rate that the factors scale.
        factors: N positive numbers.
        probe_loss: L(theta', B), evaluated at each candidate; by default ``loss`` itself.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> losses = candidate_losses(model, lambda m: m.weight.square().sum(), lr=0.1, factors=[2.0, 1.0])
        >>> [round(loss, 2) for loss in losses]  # 1 - f * 0.1 * 2, squared
        [0.36, 0.64]
    """
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

    Args:
        losses: N losses, one a factor.
        lr: learning rate that the factors scale.
        factors: N positive numbers.

    Examples:
        >>> round(next_lr([0.9, 1.0, 1.2], lr=1.0, factors=[2.0, 1.0, 0.5]), 3)
        1.234
    """
    low, high = min(losses), max(losses)
    weights = [math.exp(-(value - low) / (high - low)) for value in losses]
    total = sum(weights)
    for factor, weight in zip(factors, weights, strict=True):
        lr *= factor ** (weight / total)
    return lr


class Beam(NamedTuple):
    """Holds a model that an epoch starts from, its optimizer's state and its learning rate.

    Examples:
        >>> Beam(nn.Linear(1, 1), state={}, lr=0.1).lr
        0.1
    """

    model: nn.Module
    state: dict[str, Any] | None
    lr: float


def tree_search(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    lrs: Sequence[float],
    loader: Iterable[tuple[Tensor, Tensor]],
    epochs: int,
    *,
    beams: int = 2,
    factors: Sequence[float] = (2.0, 1.0, 0.5),
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
) -> tuple[list[Beam], list[list[tuple[int, float, float]]]]:
    """Return the beams after the last epoch, best first, and ``(parent, lr, loss)`` of each branch of each epoch.

    The ALR technique trains one branch after another. Every beam trains an epoch at each multiple of its learning
    rate. The branches of the lowest mean loss are the next beams.

    Args:
        model: left untouched.
        loss_fn: mean loss of the model's output and the target.
        lrs: one for each first beam; all of them start from the model.
        loader: pairs ``(x, y)``, read once an epoch.
        epochs: how many to train.
        beams: M that survive an epoch.
        factors: N multiples of a beam's learning rate.
        optimizer: makes one of parameters and ``lr``.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> batches = [(torch.ones(1, 1), torch.ones(1, 1))] * 4
        >>> beams, _ = tree_search(model, nn.functional.mse_loss, [0.1], batches, epochs=2)
        >>> [beam.lr for beam in beams]
        [0.4, 0.2]
    """
    survivors = [Beam(model, None, lr) for lr in lrs]
    history = []
    for _ in range(epochs):
        batches = list(loader)
        branches: list[Beam] = []
        seen = []
        for parent, beam in enumerate(survivors):
            for factor in factors:
                is_last = len(branches) + 1 == len(survivors) * len(factors)
                with torch.random.fork_rng(enabled=not is_last):  # all see the same dropout masks
                    branch, loss = _train_epoch(beam, beam.lr * factor, loss_fn, batches, optimizer)
                branches.append(branch)
                seen.append((parent, branch.lr, loss))
        history.append(seen)
        ranked = sorted((loss, index) for index, (*_, loss) in enumerate(seen) if math.isfinite(loss))
        survivors = [branches[index] for _, index in ranked[:beams]]
    return survivors, history


def _train_epoch(
    beam: Beam,
    lr: float,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    optimizer: Callable[..., torch.optim.Optimizer],
) -> tuple[Beam, float]:
    candidate = copy.deepcopy(beam.model)
    trained = optimizer(candidate.parameters(), lr=lr)
    if beam.state is not None:
        trained.load_state_dict(copy.deepcopy(beam.state))
        trained.param_groups[0]["lr"] = lr
    total, count = 0.0, 0
    for x, y in batches:
        trained.zero_grad()
        loss = loss_fn(candidate(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        trained.step()
        total += loss.item() * len(y)
        count += len(y)
    return Beam(candidate, trained.state_dict(), lr), total / count
