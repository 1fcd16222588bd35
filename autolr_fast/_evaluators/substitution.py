"""Candidates without a place in the model: torch functions are given them in place of the live parameters."""

from __future__ import annotations

import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

__all__ = ["Substitution", "run_eagerly", "storage_of", "tensors_in"]

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


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`torch.compile` was applied to the model or a part of it."""
    if "torch._dynamo" not in sys.modules:
        return False
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run compiled modules and functions as the Python that they were compiled from."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes long
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Return a tensor, or those in a list or tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """Return which memory a tensor has; ``None`` if that is not strided, or not for Python to know."""
    if tensor.layout != torch.strided:
        return None
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):  # a tensor inside vmap or grad
        return None
