"""How the losses of N candidates would be had without this package: plain loops, with the same losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .problems import Problem

__all__ = ["BASELINES", "REFERENCE", "line_search"]

REFERENCE = "source's loop"
_SUFFICIENT = 0.1  # c of Armijo's condition, as in the line search of Vaswani et al.


def copies_with_backward(problem: Problem, factors: Sequence[float]) -> list[float]:
    """The source's Algorithm 1: a deep copy, its forward and backward, the update, and a forward, N times."""
    losses = []
    for factor in factors:
        candidate = copy.deepcopy(problem.model)
        problem.loss(candidate).backward()  # the source takes a gradient of each copy; the step is known here
        losses.append(_updated_loss(problem, candidate, factor))
    return losses


def copies(problem: Problem, factors: Sequence[float]) -> list[float]:
    """The same without the backward that nothing needs: a deep copy, the update, and a forward, N times."""
    return [_updated_loss(problem, copy.deepcopy(problem.model), factor) for factor in factors]


def line_search(problem: Problem, factors: Sequence[float]) -> list[float]:
    """Armijo backtracking, which asks less: the longest of the steps that lowers the loss enough.

    As in Vaswani et al., "Painless stochastic gradient": each trial is written into the live parameters and
    costs a forward, longest step first, until ``loss(f) <= loss(0) - c * f * |<step, gradient>|`` with c = 0.1.
    Loss and gradient before the step are the training step's own. It ends at the first step that will do, so it
    tries 1 to N, and leaves the parameters there.

    Returns:
        The losses of those it tried.
    """
    parameters = list(problem.model.parameters())
    losses = []
    with torch.no_grad():
        slope = sum(
            torch.sum((now - prev) * parameter.grad)
            for prev, now, parameter in zip(problem.prev, problem.now, parameters, strict=True)
            if parameter.grad is not None
        )
        for factor in sorted(factors, reverse=True):
            _write(parameters, problem.prev, problem.now, factor)
            losses.append(problem.closure().item())
            if losses[-1] <= problem.loss_before + _SUFFICIENT * factor * float(slope):
                break
    return losses


BASELINES: dict[str, Callable[[Problem, Sequence[float]], list[float]]] = {
    REFERENCE: copies_with_backward,
    "deep copies": copies,
}
"""Those that evaluate all N."""


@torch.no_grad()
def _updated_loss(problem: Problem, candidate: nn.Module, factor: float) -> float:
    _write(list(candidate.parameters()), problem.prev, problem.now, factor)
    return problem.loss(candidate).item()


def _write(parameters: Sequence[Tensor], prev: Sequence[Tensor], now: Sequence[Tensor], factor: float) -> None:
    for parameter, before, after in zip(parameters, prev, now, strict=True):
        torch.lerp(before, after, factor, out=parameter.detach())
