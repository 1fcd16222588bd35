"""What one probe saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Probe"]


@dataclass(frozen=True, repr=False)
class Probe:
    """One look at the losses along a line of candidates, and what became of the learning rate.

    Attributes:
        step: optimizer steps done when the probe was made.
        window: optimizer steps the line spans; 0 for ``direction="gradient"``.
        factors: N factors, relative to the step that was taken.
        losses: [N] float64, the loss of each candidate, averaged over ranks.
        weights: [N] float64, the normalised scores; they sum to 1 (0 where no loss was finite).
        factor: 0-dim float64, the weighted geometric mean of the factors.
        lr_before: learning rate of each param group when the step was taken.
        lr_after: learning rate of each param group for the next step, annealing included.
        evaluator: name of the evaluator that ran.
        rounds: how often losses were evaluated: more than once where calibration took steps again.
    """

    step: int
    window: int
    factors: tuple[float, ...]
    losses: Tensor
    weights: Tensor
    factor: Tensor
    lr_before: Sequence[float | Tensor]
    lr_after: Sequence[float | Tensor]
    evaluator: str
    rounds: int = 1

    def __repr__(self) -> str:
        lrs = ", ".join(
            f"{float(a):.4g} -> {float(b):.4g}" for a, b in zip(self.lr_before, self.lr_after, strict=True)
        )
        seen = ", ".join(
            f"{factor:.4g}: {loss:.4g} ({weight:.0%})"
            for factor, loss, weight in zip(self.factors, self.losses.tolist(), self.weights.tolist(), strict=True)
        )
        return (
            f"Probe(step={self.step}, window={self.window}, evaluator={self.evaluator!r}, "
            f"rounds={self.rounds}, factor={float(self.factor):.4g}, lr {lrs}, losses {{{seen}}})"
        )
