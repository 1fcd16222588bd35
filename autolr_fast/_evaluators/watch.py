"""What a forward does with the parameters and buffers of a model, as one run of it shows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._isolation import Closure, Isolation, probed, scalar_loss
from .._machine.ranks import is_sharded
from .._steps import Line
from .base import EvaluatorError
from .substitution import Substitution, run_eagerly, storage_of, tensors_in

__all__ = ["BufferPlace", "Forward", "watch"]

_COARSE = (torch.bfloat16, torch.float16)
_NO_LEAVES = ("not require grad", "doesn't require grad", "to not have been used in the graph")
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class BufferPlace(NamedTuple):
    """Where a buffer is; a module may hold another tensor there later."""

    module: weakref.ref[nn.Module]
    name: str

    def find(self) -> Tensor | None:
        """Return the buffer that is there now, if its module lives."""
        module = self.module()
        return None if module is None else module._buffers.get(self.name)


class Forward(NamedTuple):
    """What a forward does.

    Attributes:
        losses: factor of :class:`Nearby` -> its loss; that of 0.0 at first.
        changing: where the buffers are that it changes in place, also of modules beside the model.
        is_coarse: whether it rounds to fewer digits than float32 has, as under autocast.
    """

    losses: dict[float, float]
    changing: list[BufferPlace]
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
        EvaluatorError: if it changes a parameter, or differentiates one: a stand-in does not outlast its use, and
            is no leaf.
    """
    if is_sharded(model):
        raise EvaluatorError(evaluator, model, "its parameters are sharded over ranks")
    mode = _Watch(line.parameters)
    try:
        losses, changing = _run(model, closure, mode)
    except RuntimeError as error:
        if not probed(closure).needs_gradients or not any(text in str(error) for text in _NO_LEAVES):
            raise
        with Isolation(model, closure) as isolation:
            isolation.run(closure)  # one that calls backward is at fault itself
        raise EvaluatorError(evaluator, model, f"the loss differentiates its parameters: {error}") from error
    if mode.changed:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        raise EvaluatorError(evaluator, model, f"the forward changes parameter {names[id(mode.changed[0])]!r}")
    return Forward(losses, changing, mode.is_coarse)


def _run(model: nn.Module, closure: Closure, mode: _Watch) -> tuple[dict[float, float], list[BufferPlace]]:
    """Return the loss at the weights, as a dict, and the buffers that change."""
    with Isolation(model, closure) as isolation, run_eagerly(), isolation.rewound():
        before = {
            id(buffer): (BufferPlace(weakref.ref(module), name), buffer, _version(buffer))
            for module in isolation.modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        with mode:
            loss = scalar_loss(closure)
        losses = {0.0: loss.item()}
        changing = [
            place
            for place, buffer, version in before.values()
            if id(buffer) in mode.statistics or _version(buffer) != version
        ]
    return losses, changing


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
