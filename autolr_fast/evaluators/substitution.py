"""Candidates without a place in the model: torch functions are given them in place of the live parameters."""

from __future__ import annotations

import sys
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..candidates import Line
from ..distributed import is_sharded
from ..isolation import Closure, Isolation
from .base import EvaluatorError

__all__ = ["Substitution", "run_eagerly", "storage_of", "watch"]

# What a tensor tells of itself that is not its values. No stand-in is made for that.
_METADATA = frozenset({
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement,
    torch.Tensor.stride, torch.Tensor.storage_offset, torch.Tensor.element_size, torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device, torch.Tensor.requires_grad_,
    torch.Tensor.__len__, torch.Tensor.data_ptr, torch.Tensor.is_inference,
    torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel,
})  # fmt: skip
# Attributes that are made of a tensor's values; all others are metadata too.
_VALUES = frozenset(getattr(torch.Tensor, name) for name in ("data", "T", "mT", "H", "mH", "real", "imag"))
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Substitution(TorchFunctionMode):
    """Inside it every torch function sees ``stand_in(i)`` where it was given the i-th of ``tensors``.

    It goes by identity, so it does not matter where a model keeps its weights, or how often it uses them, as
    long as Python hands them to torch.

    Args:
        tensors: parameters and buffers to be replaced.

    Attributes:
        used: indices of those that were.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self._tensors = tensors  # alive, so that their ids stay theirs
        self._index = {id(tensor): index for index, tensor in enumerate(tensors)}
        self.used: set[int] = set()

    @abstractmethod
    def stand_in(self, index: int) -> Tensor:
        """Return what takes the place of a tensor; called at every use."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if is_metadata(func):
            return func(*args, **kwargs)
        if func not in _RECURRENT:
            return self.call(func, args, kwargs)
        with warnings.catch_warnings():
            # On a GPU, of weights that do not lie in one memory: stand-ins do not.
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            return self.call(func, args, kwargs)

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a torch function with stand-ins for the tensors that have one."""
        return func(*map(self.replace, args), **{name: self.replace(value) for name, value in kwargs.items()})

    def replace(self, value: Any) -> Any:
        """Return the stand-in of a tensor, of those in a list or tuple, or the value itself."""
        index = self._index.get(id(value))
        if index is not None:
            self.used.add(index)
            return self.stand_in(index)
        if type(value) in (list, tuple):
            return type(value)(map(self.replace, value))
        return value


def is_metadata(func: Callable[..., Any]) -> bool:
    """Whether a torch function tells of a tensor what all candidates have in common."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func, "__self__", None) not in _VALUES
    return func in _METADATA


def watch(evaluator: str, model: nn.Module, line: Line, closure: Closure) -> list[Tensor]:
    """Run the closure once and look for uses of the parameters that a stand-in could not serve.

    Args:
        evaluator: its name, for the error.
        model: the module the closure calls.
        line: has the parameters.
        closure: returns the scalar loss.

    Returns:
        The buffers that the forward changed in place.

    Raises:
        EvaluatorError: if there is one.
    """
    if is_sharded(model):
        raise EvaluatorError(evaluator, model, "its parameters are sharded over ranks")
    mode = _Watch(line.parameters, model)
    before = [
        (buffer, buffer.detach().clone(), _version(buffer))
        for buffer in model.buffers()
        if buffer.layout == torch.strided
    ]
    changed: list[Tensor] = []

    def watched() -> Tensor:
        with mode:
            loss = closure()
        # Statistics are written without a new version, and may have come to rest.
        for buffer, value, version in before:
            if id(buffer) in mode.statistics or version != _version(buffer) or not _is_same(buffer, value):
                changed.append(buffer)
        return loss

    with Isolation(model) as isolation, run_eagerly():
        isolation.run(watched)
    if mode.trouble is not None:
        parameter, what = mode.trouble
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        raise EvaluatorError(evaluator, model, f"the forward {what} parameter {names[id(parameter)]!r}")
    return changed


def _is_same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run compiled modules and functions as the Python that they were compiled from."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes long
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Watch(Substitution):
    """Substitutes copies, and notes the first use that a stand-in would not do for."""

    def __init__(self, parameters: Sequence[nn.Parameter], model: nn.Module):
        super().__init__(parameters)
        self._models_own = {id(parameter) for parameter in model.parameters()}  # they may share one flat memory
        self._storages = {storage_of(parameter): parameter for parameter in parameters if parameter.numel()}
        # Tensors with the memory of a copy: what is written to them is lost, as is the copy.
        self._copies: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._owners: dict[int, Tensor] = {}
        self.statistics: set[int] = set()  # ids of what normalisations may write to
        self.trouble: tuple[Tensor, str] | None = None

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        for tensor in _tensors((*args, *kwargs.values())):
            if (
                id(tensor) not in self._models_own
                and (owner := self._storages.get(storage_of(tensor) or 0)) is not None
            ):
                self._note(owner, "uses a second tensor with the memory of")
            elif id(tensor) in self._index and func == _SET_DATA:
                self._note(tensor, "changes")
        if func in (F.batch_norm, F.instance_norm):
            self.statistics.update(map(id, (*args, *kwargs.values())))
        args = list(map(self.replace, args))
        kwargs = {name: self.replace(value) for name, value in kwargs.items()}
        copies = [tensor for tensor in _tensors((*args, *kwargs.values())) if id(tensor) in self._copies]
        versions = [_version(copy) for copy in copies]
        result = func(*args, **kwargs)
        owners = {storage_of(copy): self._owners[id(copy)] for copy in copies}
        for copy, version in zip(copies, versions, strict=True):
            if _version(copy) != version:
                self._note(self._owners[id(copy)], "changes")
        for tensor in _tensors((result,)) if copies else ():
            if (source := owners.get(storage_of(tensor))) is not None:
                self._keep(tensor, source)
        return result

    def _note(self, parameter: Tensor, what: str) -> None:
        self.trouble = self.trouble or (parameter, what)

    def stand_in(self, index: int) -> Tensor:
        parameter = self._tensors[index]
        copy = parameter.detach().clone()
        self._keep(copy, parameter)
        return copy

    def _keep(self, copy: Tensor, owner: Tensor) -> None:
        self._copies[id(copy)] = copy
        self._owners[id(copy)] = owner


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those of inference mode count no writes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def storage_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory; ``None`` if that is not strided, or not for Python to know."""
    if tensor.layout != torch.strided:
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor inside vmap or grad
        return None
