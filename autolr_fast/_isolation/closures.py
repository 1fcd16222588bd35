"""The user's closure: what it returns, and what it may not do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "CALLED_BACKWARD",
    "REMEDY",
    "Closure",
    "ClosureError",
    "NeedsGradientsError",
    "check_loss",
    "scalar_loss",
]

Closure = Callable[[], Tensor]
"""Returns the scalar loss of one batch; does not call backward."""

REMEDY = "write it as `lambda: loss_fn(model(x), y)`"
CALLED_BACKWARD = (
    f"closure called backward(), whose gradients are those of training: {REMEDY} and keep zero_grad(), backward() "
    "and optimizer.step() outside; what the loss differentiates itself comes from torch.autograd.grad"
)
_WITHOUT_GRADIENTS = ("not require grad", "doesn't require grad", "has requires_grad=False")


class ClosureError(TypeError):
    """Says that a closure returns no scalar loss, no two alike, or calls backward or the optimizer.

    Return the whole scalar loss of one batch from the closure, and call ``backward`` outside.

    Examples:
        >>> from autolr_fast import AutoLR
        >>> model = torch.nn.Linear(4, 1)
        >>> scheduler = AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> try:
        ...     scheduler.loss(lambda: model(torch.ones(8, 4)))  # eight losses, and not one
        ... except ClosureError as error:
        ...     print("not a scalar loss")
        not a scalar loss
    """


class NeedsGradientsError(ClosureError):
    """The closure differentiates something, and gradients are off: it may call backward, or may not."""


def scalar_loss(closure: Closure) -> Tensor:
    """Call the closure and return its loss as a 0-dim tensor, or say what is wrong with it."""
    try:
        loss = closure()
    except RuntimeError as error:
        if not torch.is_grad_enabled() and any(text in str(error) for text in _WITHOUT_GRADIENTS):
            raise NeedsGradientsError(CALLED_BACKWARD) from error
        raise
    check_loss(loss)
    return loss if loss.dim() == 0 else loss.reshape(())


def check_loss(loss: object) -> None:
    """Raise a ClosureError if something is no scalar loss."""
    if not isinstance(loss, Tensor):
        what = repr(loss) if isinstance(loss, (int, float, type(None))) else "several values or an object"
        raise ClosureError(
            f"closure returned {what} ({type(loss).__name__}), not a loss tensor: {REMEDY}; the tensor alone, as "
            "output.loss, without .item()"
        )
    if loss.numel() != 1:
        raise ClosureError(
            f"closure returned a tensor of shape {list(loss.shape)}, not a scalar: reduce it, e.g. .mean()"
        )
    if not loss.is_floating_point():
        raise ClosureError(f"closure returned a {loss.dtype} tensor: a loss is a real floating-point number")
