"""What a search is given by the user, looked at before anything is done with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .._arguments import is_number
from .._machine.ranks import is_sharded

__all__ = ["batch_size", "check_lrs", "check_model", "short"]


def check_model(model: object) -> None:
    """Raise a TypeError or ValueError if this is no model, or none that can be trained."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a torch.nn.Module")
    if isinstance(model, nn.parallel.DistributedDataParallel) or is_sharded(model):
        raise ValueError(
            f"model={type(model).__name__} is spread over ranks: pass the plain module, the tree gives each rank "
            "branches of its own"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"model parameter {name!r} has no shape yet: run a batch through the model first")
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(f"model parameter {name!r} is {parameter.dtype}: only real parameters can be trained")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"model={type(model).__name__} has no parameter that requires a gradient: nothing to train"
        )


def check_lrs(lr: float | Sequence[float]) -> list[float]:
    """Return the learning rates, a list also of one; raise a ValueError if they are not positive numbers."""
    given: Any = lr.tolist() if hasattr(lr, "tolist") else lr  # of an array or a tensor
    lrs = list(given) if isinstance(given, (tuple, list)) else [given]
    if not (lrs and all(map(is_number, lrs)) and all(math.isfinite(rate) and rate > 0 for rate in lrs)):
        raise ValueError(f"lr={lr!r}: expected a positive number, or a list of them")
    return [float(rate) for rate in lrs]


def batch_size(x: Any, y: Any) -> int:
    """Return how many examples a batch has."""
    for value in (y, *(x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else (x,))):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return 1


def short(value: object) -> str:
    """Return what an error shows of a value."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
