"""What a forward does with the parameters and buffers of a model, as one run of it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._isolation import Closure, Isolation, scalar_loss
from .._machine.ranks import is_sharded
from .._steps import Line
from .base import EvaluatorError
from .substitution import Substitution, run_eagerly, storage_of, tensors_in

__all__ = ["Forward", "watch"]

_COARSE = (torch.bfloat16, torch.float16)
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Forward(NamedTuple):
    """What a forward does.

    Attributes:
        losses: factor of :class:`Nearby` -> its loss; that of 0.0 at first.
        changing: names of the buffers that it changes in place.
        is_coarse: whether it rounds to fewer digits than float32 has, as under autocast.
    """

    losses: dict[float, float]
    changing: list[str]
    is_coarse: bool


@torch.no_grad()
def watch(evaluator: str, model: nn.Module, line: Line, closure: Closure) -> Forward:
    """Run the closure once, on copies of the parameters.

    Args:
        evaluator: its name, for the error.
        model: the module the closure calls.
        line: has the parameters.
        closure: returns the scalar loss.

    Raises:
        EvaluatorError: if it changes a parameter: a stand-in does not outlast its use.
    """
    if is_sharded(model):
        raise EvaluatorError(evaluator, model, "its parameters are sharded over ranks")
    mode = _Watch(line.parameters)
    before = [(name, buffer, _version(buffer)) for name, buffer in model.named_buffers()]
    with Isolation(model) as isolation, run_eagerly(), isolation.rewound():
        with mode:
            loss = scalar_loss(closure)
        losses = {0.0: loss.item()}
        changing = [
            name for name, buffer, version in before if id(buffer) in mode.statistics or _version(buffer) != version
        ]
    if mode.changed:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        raise EvaluatorError(evaluator, model, f"the forward changes parameter {names[id(mode.changed[0])]!r}")
    return Forward(losses, changing, mode.is_coarse)


class _Watch(Substitution):
    """Substitutes copies, and sees what is written to."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__(parameters)
        self._owners: dict[StorageWeakRef | None, Tensor] = {}  # memory of a copy -> parameter
        self.changed: list[Tensor] = []
        self.statistics: set[int] = set()  # ids of what batch norms may write to, which makes no new version
        self.is_coarse = False

    def stand_in(self, index: int) -> Tensor:
        copy = self._tensors[index].detach().clone()
        self._owners[storage_of(copy)] = self._tensors[index]
        return copy

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func in (F.batch_norm, torch.batch_norm):
            self.statistics.update(map(id, (*args, *kwargs.values())))
        args = self.replace(list(args))
        kwargs = {name: self.replace(value) for name, value in kwargs.items()}
        copies = [  # and views of them
            (tensor, owner, _version(tensor))
            for tensor in tensors_in([*args, *kwargs.values()])
            if (owner := self._owners.get(storage_of(tensor))) is not None
        ]
        result = func(*args, **kwargs)
        self.changed += [
            owner for tensor, owner, version in copies if func == _SET_DATA or _version(tensor) != version
        ]
        self.is_coarse |= any(tensor.dtype in _COARSE for tensor in tensors_in(result))
        return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those of inference mode count no writes
