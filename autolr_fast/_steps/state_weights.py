"""Weights that optimizers keep in their state: master copies, averages, iterates beside the parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .._machine.ranks import local
from .._optimizers import Optimizers

__all__ = ["StateWeights", "has_state"]

_NEAR = 0.01  # of the squared length of all parameters
_PARALLEL = 0.98  # squared cosine
Values = dict[nn.Parameter, dict[str, Tensor]]
"""Parameter -> name of an entry of its state -> a tensor of the parameter's shape."""


class StateWeights:
    """Finds the entries of optimizers' states that hold weights, as Schedule-Free's ``z`` or a master copy does.

    An entry of one name holds weights if, over all parameters of its optimizer, it is what they are now, or is near
    what they are or were before the first step. Momentum that is near them points where the gradient does.

    Args:
        optimizers: whose states are read.
    """

    def __init__(self, optimizers: Optimizers):
        self._optimizers = optimizers
        self._names: dict[int, set[str]] = {}  # index of an optimizer -> names, once its state has entries
        self._compared: dict[int, set[str]] = {}  # all names that were looked at

    def find(self, before: Mapping[nn.Parameter, Tensor] | None = None) -> None:
        """Compare the entries with the parameters, and what they were before, unless that was done already."""
        if not all(map(has_state, self._optimizers)):
            return
        for index, optimizer in enumerate(self._optimizers):
            names = _names_in(optimizer)
            if names != self._compared.get(index):  # some come later, as a Lookahead's
                now = {parameter: parameter.detach() for parameter in self._optimizers.parameters}
                found = _names_near(optimizer, now, may_be_parallel=True)
                found |= _names_near(optimizer, before or {}, may_be_parallel=False)
                known = self._compared.get(index, set())
                self._names[index] = self._names.get(index, set()) | (found - known)
                self._compared[index] = names

    def state(self) -> list[list[list[str]]]:
        """Return what :meth:`load` takes: the names of each optimizer that hold weights, and all of them."""
        return [[sorted(self._names[index]), sorted(self._compared[index])] for index in sorted(self._names)]

    def load(self, state: Sequence[Sequence[Sequence[str]]]) -> None:
        """Take over what :meth:`state` returned."""
        self._names = {index: set(names) for index, (names, _) in enumerate(state)}
        self._compared = {index: set(names) for index, (_, names) in enumerate(state)}

    def values(self) -> Values:
        """Return the live tensors that hold weights."""
        found: Values = {}
        for index, optimizer in enumerate(self._optimizers):
            for parameter, name, tensor in _entries(optimizer) if self._names.get(index) else ():
                if name in self._names[index]:
                    found.setdefault(parameter, {})[name] = tensor
        return found


def _names_in(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names of the entries of the first parameter that has some."""
    return next(
        (set(map(str, state)) for state in optimizer.state.values() if isinstance(state, dict) and state), set()
    )


def _names_near(
    optimizer: torch.optim.Optimizer, weights: Mapping[nn.Parameter, Tensor], may_be_parallel: bool
) -> set[str]:
    """Return the names of entries that are near some weights, and are these or point elsewhere than gradients."""
    decays = {
        each: float(group.get("weight_decay", 0)) for group in optimizer.param_groups for each in group["params"]
    }
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for parameter, name, tensor in _entries(optimizer):
        if parameter in weights:
            entry, weight = tensor.double(), local(weights[parameter]).double()
            gradient = decays[parameter] * weight  # which moments have too, if it is not decoupled
            if parameter.grad is not None:
                gradient = gradient + local(parameter.grad).to_dense().double()
            pairs = (entry - weight, entry - weight), (weight, weight), (entry, gradient), (entry, entry)
            products = [one * other for one, other in (*pairs, (gradient, gradient))]
            sums[name] += torch.stack([product.sum() for product in products]).cpu()
    eps = max((torch.finfo(weight.dtype).eps for weight in weights.values()), default=0.0)
    near = set()
    for name, (away, length, along, own, gradients) in ((name, each.tolist()) for name, each in sums.items()):
        is_gradient = along**2 > _PARALLEL * own * gradients
        are_these = may_be_parallel and away <= (2 * eps) ** 2 * length
        if length and (are_these or (away <= _NEAR * length and not is_gradient)):
            near.add(name)
    return near


def _entries(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """Return the tensors of the state that have as many elements as their parameter, in its shape."""
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor) or not isinstance(state, dict):
            continue
        for name, value in state.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or name == "step":
                continue
            entry, live = local(value), local(parameter)
            if entry.numel() == live.numel() and entry.is_contiguous() and entry.data_ptr() != live.data_ptr():
                yield parameter, name, entry.view(live.shape)  # type: ignore[misc]


def has_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps anything yet; some make empty entries before they step."""
    return any(not isinstance(state, dict) or state for state in optimizer.state.values())
