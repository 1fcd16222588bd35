"""Candidates folded into the batch: operations linear in their parameters need no candidate's weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..candidates import Line, dense_strides
from . import folding
from .batched import Batched
from .substitution import Substitution

__all__ = ["Folded"]


class Folded(Batched):
    """One batched forward without N sets of weights: ``op(x, now + c * step) = op(x, now) + c * op(x, step)``.

    Linear layers, convolutions and embeddings whose input is still the same for all candidates run twice, not N
    times; later ones take each candidate's weights for that operation alone. See
    :mod:`autolr_fast.evaluators.folding` for the rules. Extra memory: N times the largest parameter and the
    activations of N forwards.
    """

    @property
    def name(self) -> str:
        """``"folded"``."""
        return "folded"

    def _first_chunk(self, line: Line) -> int:
        return sys.maxsize

    def _operands(self, line: Line, factors: Sequence[float]) -> list[Tensor]:
        double = any(parameter.dtype == torch.float64 for parameter in line.parameters)
        dtype = torch.float64 if double else torch.float32
        # A copy that nobody waits for; also where tensors are made on a GPU by default.
        coefficients = torch.tensor(line.coefficients(factors), dtype=dtype, device="cpu")
        return [coefficients.to(line.parameters[0].device, non_blocking=True)]

    def _substitution(
        self, line: Line, operands: Sequence[Tensor], buffers: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> Substitution:
        return _Folding(line, operands[0], buffers, rows)


class _Folding(Substitution):
    """Splits the operations that it has a rule for, and gives the others candidates ``now + c * direction``."""

    def __init__(self, line: Line, coefficient: Tensor, buffers: Sequence[Tensor], rows: Sequence[Tensor]):
        super().__init__([*line.parameters, *buffers])
        self._line = line
        self._coefficient = coefficient
        self._rows = rows
        self._scratch: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        rule = _RULES.get(func)
        if rule is not None and not torch.is_grad_enabled():  # the rules are not differentiated
            result = rule(self, *args, **kwargs)
            if result is not None:
                return result
        return super().call(func, args, kwargs)

    def split(self, tensor: Tensor, slot: int = 0) -> tuple[Tensor, Tensor] | None:
        """Return a parameter as it is now and its direction; ``None`` if it is none of the line's.

        The direction lies in memory that the next one of the same slot takes again.
        """
        index = self._index.get(id(tensor))
        if index is None or index >= len(self._line.parameters):
            return None
        self.used.add(index)
        now = tensor.detach()
        return now, self._direction(index, now, slot)

    def coefficient(self, like: Tensor) -> Tensor:
        """Return c in the dtype and on the device of a tensor, 0-dim."""
        return self._coefficient.to(like.device, like.dtype)

    def stand_in(self, index: int) -> Tensor:
        first = len(self._line.parameters)
        if index >= first:
            return self._rows[index - first]
        now = self._tensors[index].detach()
        return now + self.coefficient(now) * self._direction(index, now)

    def _direction(self, index: int, now: Tensor, slot: int = 0) -> Tensor:
        kind = (now.device, now.dtype, slot)
        scratch = self._scratch.get(kind)
        if scratch is None or len(scratch) < now.numel():
            scratch = self._scratch[kind] = torch.empty(now.numel(), dtype=now.dtype, device=now.device)
        return self._line.direction(index, now, out=scratch.as_strided(now.shape, dense_strides(now)))


def _linear(mode: _Folding, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return _affine(mode, folding.linear, input, weight, bias)


def _conv(dimensions: int) -> Callable[..., Tensor | None]:
    def rule(
        mode: _Folding,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if isinstance(padding, str) or input.dim() != dimensions + 2:
            return None
        sizes = [
            [size] * dimensions if isinstance(size, int) else list(size) for size in (stride, padding, dilation)
        ]
        return _affine(mode, folding.convolution, input, weight, bias, *sizes, groups)

    return rule


def _affine(
    mode: _Folding, operator: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor | None:
    split = _split_weight(mode, input, weight)
    if split is None:
        return None
    bias_now, bias_direction = bias, None
    if bias is not None and (split_bias := mode.split(bias, slot=1)) is not None:
        bias_now, bias_direction = split_bias
    return operator(input, mode.coefficient(split[0]), *split, bias_now, bias_direction, *rest)


def _split_weight(mode: _Folding, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the weight's parts, if the operation is linear in it alone and of its own dtype."""
    # Autocast chooses dtypes by function, and knows its own.
    if torch.is_autocast_enabled(weight.device.type) or mode.split(input) is not None:
        return None
    return mode.split(weight)


def _batch_norm(
    mode: _Folding,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not training or mode.split(input) is not None:
        return None
    # Running statistics play no part in the output, and are put back after a candidate.
    (now, direction), (bias_now, bias_direction) = (
        (value, None) if value is None else mode.split(value, slot) or (value, None)
        for slot, value in enumerate((weight, bias))
    )
    out: Tensor = folding.batch_norm(
        input, mode.coefficient(input if now is None else now), now, direction, bias_now, bias_direction, eps
    )
    return out


def _matmul(mode: _Folding, input: Tensor, other: Tensor) -> Tensor | None:
    split = _split_weight(mode, input, other) if other.dim() == 2 and input.dim() >= 2 else None
    if split is None:
        return None
    now, direction = split
    out: Tensor = folding.linear(input, mode.coefficient(now), now.t(), direction.t(), None, None)
    return out


def _embedding(
    mode: _Folding,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **kwargs: Any,
) -> Tensor | None:
    split = mode.split(weight)
    if split is None or max_norm is not None:
        return None
    now, step = (F.embedding(input, tensor, padding_idx, None, *rest, **kwargs) for tensor in split)
    return now + mode.coefficient(now) * step


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.conv1d: _conv(1),
    F.conv2d: _conv(2),
    F.conv3d: _conv(3),
    F.batch_norm: _batch_norm,
    F.embedding: _embedding,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
}
