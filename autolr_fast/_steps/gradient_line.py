"""The line along one fresh gradient of the closure, which the source's Algorithm 1 has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _ops as ops
from .._isolation import CALLED_BACKWARD, Closure, ClosureError, Isolation, scalar_loss
from .._machine.ranks import ProcessGroup, is_sharded, mean_over_ranks
from .._optimizers import Optimizers
from .lines import squared_length

__all__ = ["GradientLine", "check_not_sharded"]


class GradientLine:
    """``now - f * lr * grad``: the source to the letter, along one fresh gradient of the closure.

    Args:
        model: its buffers, gradients and random-number streams are left as they are.
        optimizers: give the parameters and, for each, the learning rate of its group.
        closure: returns the scalar loss.
        process_group: the ranks whose gradients are averaged.

    Raises:
        ClosureError: if the loss does not depend on the parameters.
    """

    window = 0

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        closure: Closure,
        process_group: ProcessGroup | None = None,
    ):
        groups = optimizers.param_groups
        group_of = {parameter: index for index, group in enumerate(groups) for parameter in group["params"]}
        trained = [parameter for parameter in group_of if parameter.requires_grad]
        # The backward runs before the buffers are put back: it may have saved them.
        with Isolation(model, closure) as isolation, isolation.rewound(gradients=True):
            loss = scalar_loss(closure)
            if any(parameter.grad is not None for parameter in trained):
                raise ClosureError(CALLED_BACKWARD)
            if not loss.requires_grad:
                raise ClosureError(
                    'direction="gradient" differentiates the loss, but the closure returned a detached one: '
                    "return loss_fn(model(x), y) itself"
                )
            gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        self.parameters = trained
        self._gradients = [mean_over_ranks(gradient.to_dense(), process_group) for gradient in gradients]
        device = next((group["lr"].device for group in groups if isinstance(group["lr"], Tensor)), None)
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64, device=device).reshape(()) for group in groups]
        self._rates = torch.stack([rates[group_of[parameter]] for parameter in trained])

    def writer(self, now: Sequence[Tensor], rows: Sequence[Tensor]) -> ops.Writer:
        """Return what writes ``now - f * lr * grad``; see :class:`Line`."""
        return ops.gradient_candidate_writer(now, self._gradients, self._rates, rows)

    def write_one(self, factor: float, now: Tensor, out: Tensor, index: int) -> None:
        """Write one parameter of one candidate; see :class:`Line`."""
        rate = self._rates[index : index + 1].to(now.device)
        ops.write_gradient_candidate(now, self._gradients[index], rate, factor, out)

    def squares(self) -> Tensor:
        """Return the squared length of the step, and of the parameters that it begins at: [2] float64."""
        rates = self._rates.tolist()
        steps = (rate * gradient for rate, gradient in zip(rates, self._gradients, strict=True))
        return torch.stack([squared_length(steps), squared_length(each.detach() for each in self.parameters)])


def check_not_sharded(model: nn.Module) -> None:
    """Raise a ValueError if a model has no whole gradient."""
    if is_sharded(model):
        raise ValueError(
            "rule=Rule(direction='gradient') takes a whole gradient, and the model is sharded over ranks: use "
            "direction='step'"
        )
