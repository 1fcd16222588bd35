"""From losses to a factor: normalise, score, score-weighted geometric mean.

Knows no models and no learning rates. Nothing here synchronises with the host: every branch is a ``where``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "FACTORS_2",
    "FACTORS_3",
    "FACTORS_5",
    "FACTORS_7",
    "NORMALIZATIONS",
    "SCORES",
    "check_factors",
    "resolve_rules",
    "weigh",
]

Rule = Callable[[Tensor], Tensor]
"""A normalisation or a score: [N] in, [N] out."""

FACTORS_2: tuple[float, ...] = (1.5, 1 / 1.5)
FACTORS_3: tuple[float, ...] = (2.0, 1.0, 0.5)
FACTORS_5: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5, 0.125)
FACTORS_7: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125)


def weigh(losses: Tensor, factors: Sequence[float], normalize: Rule, score: Rule) -> tuple[Tensor, Tensor]:
    """Weigh each factor by the score of its loss and return the weighted geometric mean.

    With ``x = normalize(losses)`` and ``w = score(x)`` the result is ``prod_n factors[n] ** (w_n / sum(w))``
    (Kim & Yu, "Automated learning rate scheduling with in-training information", Algorithm 1). Three cases the
    source leaves open: a loss that is not finite weighs 0, and ``normalize`` sees the largest finite loss in
    its place; if no loss is finite, the smallest factor is taken; losses that are all equal, or weights that
    are all 0, say nothing, and the factor is 1.

    Args:
        losses: [N] floating point, one loss a candidate.
        factors: N positive numbers.
        normalize: losses [N] -> x [N].
        score: x [N] -> weights [N]; only their ratios matter, and a negative one counts as 0.

    Returns:
        ``(weights, factor)``: weights [N] that sum to 1, and a 0-dim factor, both on the device of ``losses``.

    Example:
        >>> losses = torch.tensor([0.9, 1.0, 1.2], dtype=torch.float64)
        >>> weights, factor = weigh(losses, FACTORS_3, NORMALIZATIONS["minmax"], SCORES["exp"])
        >>> [round(w, 3) for w in weights.tolist()], round(factor.item(), 3)
        ([0.48, 0.344, 0.176], 1.234)
    """
    finite = losses.isfinite()
    worst = losses.masked_fill(~finite, -math.inf).amax()
    filled = torch.where(finite, losses, worst)

    raw = torch.where(finite, score(normalize(filled)), 0.0).clamp_min(0.0)
    weights = raw / raw.sum()
    spread = losses.new_tensor(factors)
    factor = (weights * spread.log()).sum().exp()

    silent = (losses == losses[0]).all() | ~factor.isfinite()
    factor = torch.where(silent, 1.0, factor)
    factor = torch.where(finite.any(), factor, spread.amin())
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


NORMALIZATIONS: Mapping[str, Rule] = {"minmax": _minmax, "zscore": _zscore, "sum": _sum, "none": _none}
SCORES: Mapping[str, Rule] = {"exp": _exp}


def check_factors(factors: Sequence[float]) -> tuple[float, ...]:
    """Return the factors as a tuple of floats.

    Raises:
        ValueError: if they are empty, not positive and finite, hold one number twice, or all lead one way.
    """
    try:
        if isinstance(factors, str):
            raise TypeError("a string")
        checked = tuple(float(factor) for factor in factors)
    except (TypeError, ValueError) as error:
        raise ValueError(
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


def resolve_rules(normalize: str | Rule, score: str | Rule, count: int) -> tuple[Rule, Rule]:
    """Return the normalisation and the score that the arguments name or are.

    A callable is tried once: a normalisation on ``count`` losses, a score on what the normalisation makes of them.

    Raises:
        ValueError: if a name is not known, or a callable does not map [N] to N usable numbers.
        TypeError: if an argument is neither a name nor callable.
    """
    losses = torch.linspace(1.0, 2.0, count, dtype=torch.float64)
    normalization = _resolve("normalize", normalize, NORMALIZATIONS, losses)
    return normalization, _resolve("score", score, SCORES, normalization(losses))


def _resolve(argument: str, value: str | Rule, known: Mapping[str, Rule], sample: Tensor) -> Rule:
    names = ", ".join(repr(name) for name in known)
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{argument}={value!r} is not known: use one of {names}, or a callable [N] -> [N]")
        return known[value]
    if not callable(value):
        raise TypeError(f"{argument}={value!r}: expected one of {names}, or a callable [N] -> [N]")
    result = value(sample)
    usable = isinstance(result, Tensor) and result.shape == sample.shape and bool(result.isfinite().all())
    if not usable or (argument == "score" and bool((result < 0).any())):
        raise ValueError(
            f"{argument}={value!r} returned {result!r} for {sample.tolist()}: it must return a tensor of the "
            f"same shape, {list(sample.shape)}, with finite numbers (a score: none of them negative)"
        )
    return value
