"""The source's rule: from the losses of N candidates to one factor. Knows no models and no learning rates.

Nothing here synchronises with the host: every branch is a ``where``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_count

__all__ = [
    "FACTORS_2",
    "FACTORS_3",
    "FACTORS_5",
    "FACTORS_7",
    "NORMALIZATIONS",
    "SCORES",
    "Rule",
    "Transform",
    "check_factors",
]

Transform = Callable[[Tensor], Tensor]
"""A normalisation or a score: [N] in, [N] out."""

FACTORS_2: tuple[float, ...] = (1.5, 1 / 1.5)
"""The factors of a `Rule` by default; a probe costs two forwards.

Examples:
    >>> Rule().factors == FACTORS_2
    True
"""
FACTORS_3: tuple[float, ...] = (2.0, 1.0, 0.5)
"""The source's Factor_3; a probe costs three forwards.

Examples:
    >>> Rule(FACTORS_3).factors
    (2.0, 1.0, 0.5)
"""
FACTORS_5: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5, 0.125)
"""The source's Factor_5; a probe costs five forwards, and the factors lean down by themselves.

Examples:
    >>> math.prod(FACTORS_5)
    0.5
"""
FACTORS_7: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)
"""The source's Factor_7; a probe costs seven forwards.

Examples:
    >>> math.prod(FACTORS_7)
    1.0
"""


@dataclass(frozen=True)
class Rule:
    """Holds what Algorithm 1 of the source leaves to choose: the candidates, and how losses weigh the factors.

    Give one to ``AutoLR(rule=...)`` to look along the last steps as the source does. The learning rate moves by
    ``prod_n factors[n] ** (w_n / sum(w))``, with ``x = normalize(losses)`` and ``w = score(x)``. The formula is
    that of Kim & Yu, "Automated learning rate scheduling with in-training information", Algorithm 1.

    Args:
        factors: N different positive numbers, some above 1 and some below: the candidates, in units of the step.
        score: ``"exp"`` for exp(-x), or a callable from x [N] to weights [N], not negative.
        normalize: ``"minmax"``, ``"zscore"``, ``"sum"`` (losses over their absolute sum), ``"none"``, or a callable
            from losses [N] to x [N].
        direction: ``"step"`` lays the candidates on the line through the optimizer's steps. ``"gradient"`` lays
            them on ``now - f * lr * grad``, with a fresh gradient of the closure.
        window_steps: optimizer steps that the line of ``"step"`` spans: one number, or several that take turns.

    Raises:
        TypeError: if an argument is of a kind that cannot be meant.
        ValueError: if an argument has a value that cannot be meant.

    Examples:
        >>> weights, factor = Rule(FACTORS_3).weigh(torch.tensor([0.9, 1.0, 1.2], dtype=torch.float64))
        >>> [round(w, 3) for w in weights.tolist()], round(factor.item(), 3)
        ([0.48, 0.344, 0.176], 1.234)
    """

    factors: Sequence[float] = FACTORS_2
    score: str | Transform = "exp"
    normalize: str | Transform = "minmax"
    direction: str = "step"
    window_steps: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", check_factors(self.factors))
        losses = torch.linspace(1.0, 2.0, len(self.factors), dtype=torch.float64)
        normalize = _resolve("normalize", self.normalize, NORMALIZATIONS, losses)
        _resolve("score", self.score, SCORES, normalize(losses))
        if self.direction not in ("step", "gradient"):
            raise ValueError(f"direction={self.direction!r} is not known: use 'step' or 'gradient'")
        object.__setattr__(self, "window_steps", _check_windows(self.window_steps))

    @property
    def unscaled(self) -> int:
        """Index of the factor nearest to 1: of the candidate most like the step as it was taken."""
        return min(range(len(self.factors)), key=lambda n: abs(math.log(self.factors[n])))

    def weigh(self, losses: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weigh each factor by the score of its loss, and return the weighted geometric mean.

        The source leaves three cases open:

        - A loss that is not finite weighs 0, and ``normalize`` sees the largest finite loss in its place.
        - The factor is 1 if all losses are equal, all weights 0, or no loss is finite: such losses say nothing of
          the rate.
        - The smallest factor is taken if no loss is finite, but the loss before the step was.

        Args:
            losses: [N] float64, one loss a candidate; lower is better.
            before: 0-dim, the loss before the step; ``None``, or not a number, if unknown.

        Returns:
            ``(weights, factor)`` on the device of ``losses``. The weights [N] sum to 1, or are 0 if no loss is
                finite or every score is 0. The factor is 0-dim.
        """
        normalize = _resolve("normalize", self.normalize, NORMALIZATIONS)
        score = _resolve("score", self.score, SCORES)
        finite = losses.isfinite()
        worst = losses.masked_fill(~finite, -math.inf).amax()
        filled = torch.where(finite, losses, worst)

        raw = torch.where(finite, score(normalize(filled)), 0.0).clamp_min(0.0)
        weights = raw / raw.sum()
        spread = losses.new_tensor(self.factors)
        factor = (weights * spread.log()).sum().exp()

        silent = (losses == losses[0]).all() | ~factor.isfinite() | ~finite.any()
        factor = torch.where(silent, 1.0, factor)
        if before is not None:
            factor = torch.where(finite.any() | ~before.isfinite(), factor, spread.amin())
        return torch.nan_to_num(weights), factor


def _minmax(losses: Tensor) -> Tensor:
    return (losses - losses.amin()) / _nonzero(losses.amax() - losses.amin())


def _zscore(losses: Tensor) -> Tensor:
    return (losses - losses.mean()) / _nonzero(losses.std(correction=0))


def _sum(losses: Tensor) -> Tensor:
    return losses / _nonzero(losses.abs().sum())


def _none(losses: Tensor) -> Tensor:
    return losses


def _exp(x: Tensor) -> Tensor:
    # exp(-x) up to a common factor, which cancels in the weights and would underflow for large losses.
    return (x.amin() - x).exp()


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


NORMALIZATIONS: Mapping[str, Transform] = {"minmax": _minmax, "zscore": _zscore, "sum": _sum, "none": _none}
SCORES: Mapping[str, Transform] = {"exp": _exp}


def check_factors(factors: Sequence[float]) -> tuple[float, ...]:
    """Return the factors as a tuple of floats.

    Raises:
        TypeError: if they are no numbers.
        ValueError: if they are empty, not positive and finite, hold one number twice, or all lead one way.
    """
    try:
        if isinstance(factors, str):
            raise TypeError("a string")
        checked = tuple(float(factor) for factor in factors)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"factors={factors!r}: expected numbers such as {FACTORS_3}, or FACTORS_2, _3, _5 or _7"
        ) from error
    if not checked:
        raise ValueError(f"factors={factors!r} is empty: give at least one number, such as {FACTORS_3}")
    if bad := [f for f in checked if not (math.isfinite(f) and f > 0)]:
        raise ValueError(f"factors={checked}: {bad[0]} is not a positive finite number; remove it")
    if twice := [f for f in checked if checked.count(f) > 1]:
        raise ValueError(f"factors={checked}: {twice[0]} appears more than once; list each factor once")
    if not min(checked) < 1 < max(checked):
        raise ValueError(f"factors={checked}: the rate could move one way only; give some above 1 and some below")
    return checked


def _check_windows(window_steps: int | Sequence[int]) -> int | tuple[int, ...]:
    """Return the windows as Python's numbers."""
    windows = window_steps if isinstance(window_steps, Sequence) else (window_steps,)
    if not windows:
        raise ValueError(f"window_steps={window_steps!r} is empty: give one number of optimizer steps, or several")
    counts = tuple(check_count("window_steps", count, at_least=1) for count in windows)
    return counts if isinstance(window_steps, Sequence) else counts[0]


def _resolve(
    argument: str, value: str | Transform, known: Mapping[str, Transform], sample: Tensor | None = None
) -> Transform:
    """Return the function that an argument names or is, after a trial call on a sample, if one is given."""
    if isinstance(value, str):
        if value not in known:
            names = ", ".join(repr(name) for name in known)
            raise ValueError(f"{argument}={value!r} is not known: use one of {names}, or a callable [N] -> [N]")
        return known[value]
    if sample is None:
        return value
    if not callable(value):
        names = ", ".join(repr(name) for name in known)
        raise TypeError(f"{argument}={value!r}: expected one of {names}, or a callable [N] -> [N]")
    result = value(sample)
    usable = isinstance(result, Tensor) and result.shape == sample.shape and bool(result.isfinite().all())
    if not usable or (argument == "score" and bool((result < 0).any())):
        raise ValueError(
            f"{argument}={value!r} returned {result!r} for {sample.tolist()}: it must return a tensor of the "
            f"same shape, {list(sample.shape)}, with finite numbers (a score: none of them negative)"
        )
    return value
