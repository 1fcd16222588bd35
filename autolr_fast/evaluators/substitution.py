"""Candidates without a place in the model: torch functions are given them in place of the live parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..candidates import Line
from ..distributed import is_sharded
from ..isolation import Closure, Isolation
from .base import EvaluatorError

__all__ = ["Substitution", "check_reach", "run_eagerly"]

# What a tensor tells of itself that is not its values. No stand-in is made for that.
_METADATA = frozenset({
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement,
    torch.Tensor.stride, torch.Tensor.storage_offset, torch.Tensor.element_size, torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device, torch.Tensor.requires_grad_,
    torch.Tensor.__len__, torch.Tensor.data_ptr, torch.Tensor.is_inference,
    torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.numel,
})  # fmt: skip
# Attributes that are made of a tensor's values; all others are metadata too.
_VALUES = frozenset(vars(torch.Tensor).get(name) or getattr(torch.Tensor, name)
                    for name in ("data", "T", "mT", "H", "mH", "real", "imag"))  # fmt: skip


class Substitution(TorchFunctionMode):
    """Inside it every torch function sees ``stand_in(i)`` where it was given the i-th of ``tensors``.

    It goes by identity, so it does not matter where a model keeps its weights, or how often it uses them, as
    long as Python hands them to torch.

    Args:
        tensors: parameters and buffers to be replaced.
        stand_in: called at every use.
    """

    def __init__(self, tensors: Sequence[Tensor], stand_in: Callable[[int], Tensor]):
        super().__init__()
        self._tensors = tensors  # alive, so that their ids stay theirs
        self._index = {id(tensor): index for index, tensor in enumerate(tensors)}
        self._stand_in = stand_in

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_metadata(func):
            return func(*args, **kwargs)
        return self.call(func, args, kwargs)

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a torch function with stand-ins for the tensors that have one."""
        return func(*map(self.replace, args), **{name: self.replace(value) for name, value in kwargs.items()})

    def replace(self, value: Any) -> Any:
        """Return the stand-in of a tensor, of those in a list or tuple, or the value itself."""
        index = self._index.get(id(value))
        if index is not None:
            return self._stand_in(index)
        if type(value) in (list, tuple):
            return type(value)(map(self.replace, value))
        return value


def is_metadata(func: Callable[..., Any]) -> bool:
    """Whether a torch function tells of a tensor what all candidates have in common."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func, "__self__", None) not in _VALUES
    return func in _METADATA


def check_reach(evaluator: str, model: nn.Module, line: Line, closure: Closure) -> list[Tensor]:
    """Run the closure once and see that it uses the parameters only where :class:`Substitution` can replace them.

    Args:
        evaluator: its name, for the error.
        model: the module the closure calls.
        line: has the parameters.
        closure: returns the scalar loss.

    Returns:
        The buffers that the forward changed in place.

    Raises:
        EvaluatorError: if it does not.
    """
    if is_sharded(model):
        raise EvaluatorError(evaluator, model, "its parameters are sharded over ranks")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    watch = _Watch(line.parameters)
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    changed: list[Tensor] = []

    def watched() -> Tensor:
        with watch:
            loss = closure()
        changed.extend(buffer for buffer, value in before if not _is_same(buffer, value))
        return loss

    with Isolation(model) as isolation, run_eagerly():
        loss = isolation.run(watched)
        if watch.trouble is not None:
            parameter, what = watch.trouble
            raise EvaluatorError(evaluator, model, f"the forward {what} parameter {names[id(parameter)]!r}")
        # A parameter that was not seen must not matter.
        for parameter in line.parameters:
            if id(parameter) not in watch.seen and not _is_unused(parameter, loss, isolation, closure):
                raise EvaluatorError(
                    evaluator, model, f"parameter {names[id(parameter)]!r} is used where no torch function is given it"
                )
    return changed


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run compiled modules and functions as the Python that they were compiled from."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes long
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Watch(Substitution):
    """Substitutes copies, and notes which parameters are used and the first use that a stand-in would not do for."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__(parameters, self._copy)
        self._storages = {_storage(parameter): parameter for parameter in parameters if parameter.numel()}
        self.seen: set[int] = set()
        self.trouble: tuple[Tensor, str] | None = None

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        written = [args[0]] if args and _writes_first(func) else []
        written += [kwargs["out"]] if "out" in kwargs else []
        for tensor in _tensors((*args, *kwargs.values())):
            if id(tensor) not in self._index and (owner := self._storages.get(_storage(tensor))) is not None:
                self.trouble = self.trouble or (owner, "uses a second tensor with the memory of")
        for tensor in _tensors(written):
            if id(tensor) in self._index:
                self.trouble = self.trouble or (tensor, "changes")
        return super().call(func, args, kwargs)

    def _copy(self, index: int) -> Tensor:
        self.seen.add(id(self._tensors[index]))
        return self._tensors[index].detach().clone()


def _is_unused(parameter: nn.Parameter, loss: Tensor, isolation: Isolation, closure: Closure) -> bool:
    live = parameter.detach()
    saved = live.clone()
    try:
        live.add_(live.abs().mean().nan_to_num() + 0.5)
        other = isolation.run(closure)
    finally:
        live.copy_(saved)
    return _is_same(other, loss)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _writes_first(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # not strided memory: sparse, batched, a wrapper
        return 0
