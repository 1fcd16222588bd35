"""Arithmetic of single numbers: Python's on the CPU, where torch's takes ten times as long; torch's elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Scalar", "Scalars", "scalars_of"]

Scalar = Any
"""A float on the CPU, a 0-dim float64 tensor elsewhere; of a comparison a bool, or a 0-dim bool tensor."""


class Scalars(Protocol):
    """What formulas need beside the operators of Python. Numbers that are not finite go through as in torch."""

    def number(self, value: Tensor | float) -> Scalar:
        """Return a value as a scalar."""

    def tensor(self, value: Scalar) -> Tensor:
        """Return a scalar as a 0-dim float64 tensor."""

    def plain(self, value: Scalar) -> float:
        """Return a scalar as a number, which waits for an accelerator."""

    def where(self, condition: Scalar, then: Scalar, otherwise: Scalar) -> Scalar:
        """Return one of two scalars."""

    def greater(self, one: Scalar, other: Scalar) -> Scalar:
        """Return the greater of two scalars."""

    def is_finite(self, value: Scalar) -> Scalar:
        """Return whether a scalar is finite."""

    def median(self, values: Sequence[Scalar]) -> tuple[Scalar, Scalar]:
        """Return the median of those that are finite, the upper one of two, and how many these are."""


class _OnCPU:
    @staticmethod
    def number(value: Tensor | float) -> float:
        return float(value)

    @staticmethod
    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    plain = number

    @staticmethod
    def where(condition: bool, then: float, otherwise: float) -> float:
        return then if condition else otherwise

    @staticmethod
    def greater(one: float, other: float) -> float:
        return other if one < other or math.isnan(other) else one

    is_finite = staticmethod(math.isfinite)

    @staticmethod
    def median(values: Sequence[float]) -> tuple[float, int]:
        finite = sorted(filter(math.isfinite, values))
        return (finite[len(finite) // 2] if finite else math.nan), len(finite)


class _Elsewhere:
    def __init__(self, device: torch.device):
        self._device = device

    def number(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=self._device)

    tensor = number

    @staticmethod
    def plain(value: Tensor) -> float:
        return value.item()

    @staticmethod
    def where(condition: Tensor, then: Tensor | float, otherwise: Tensor | float) -> Tensor:
        return torch.where(condition, then, otherwise)

    @staticmethod
    def greater(one: Tensor, other: Tensor) -> Tensor:
        return torch.maximum(one, other)

    @staticmethod
    def is_finite(value: Tensor) -> Tensor:
        return value.isfinite()

    @staticmethod
    def median(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        known = torch.stack(list(values))
        count = known.isfinite().sum()
        ordered = torch.where(known.isfinite(), known, math.nan).sort().values  # what is not a number comes last
        return ordered.gather(0, (count // 2).clamp_max(len(values) - 1).reshape(1)).squeeze(0), count


def scalars_of(device: torch.device) -> Scalars:
    """Return the arithmetic of a device."""
    return _OnCPU() if device.type == "cpu" else _Elsewhere(device)
