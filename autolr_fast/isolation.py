"""What keeps a probe from being noticed: whatever a closure touches is put back, bit for bit."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from .copies import Copies
from .distributed import sharded_modules

__all__ = [
    "CALLED_BACKWARD",
    "REMEDY",
    "Closure",
    "ClosureError",
    "Isolation",
    "ModuleStates",
    "RandomStreams",
    "check_repeatable",
    "scalar_loss",
]

Closure = Callable[[], Tensor]
"""Returns the scalar loss of one batch; does not call backward."""

REMEDY = "write it as `lambda: loss_fn(model(x), y)`"
CALLED_BACKWARD = (
    f"closure called backward(); a probe only needs the loss: {REMEDY} and keep zero_grad(), backward() and "
    "optimizer.step() outside"
)


class ClosureError(TypeError):
    """The closure is not one: it returned something other than a scalar loss, or called backward."""


class Isolation:
    """Runs a closure any number of times as if it had never run.

    Inside the ``with`` block gradients are out of the closure's reach; at each :meth:`run` the modules (buffers,
    other attributes, train or eval mode, which parameters require a gradient) and the random-number streams
    (torch's on every initialised device, Python's, NumPy's where it is loaded) start from what they were, so all
    candidates see the same dropout masks. What the closure owns besides is its own: other modules, generators.

    Args:
        model: the module that is protected, with all its submodules.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with Isolation(model) as isolation:
        ...     loss = isolation.run(lambda: model(torch.randn(4, 2)).square().mean())
        >>> model.num_batches_tracked.item()
        0
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def __enter__(self) -> Isolation:
        modules = list(self._model.modules())
        self._modules = ModuleStates(modules)
        self._random = RandomStreams()
        parameters = list(self._model.parameters())  # which may hold other than those of the modules
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._frozen = _copies_of_frozen(parameters)
        for parameter in parameters:
            parameter.grad = None
        self._sharded = sharded_modules(modules)
        self._reshard()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def run(self, closure: Closure, within: AbstractContextManager[Any] | None = None) -> Tensor:
        """Return the closure's loss, which autograd does not record.

        Args:
            closure: called once.
            within: what it is called inside of.

        Returns:
            The loss, 0-dim.

        Raises:
            ClosureError: if the closure does not return a scalar loss tensor, or calls backward.
        """
        with self.rewound(), torch.no_grad(), within or nullcontext():
            return scalar_loss(closure)

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Put modules, random-number streams and autocast's cache back at the end of the block."""
        # Autocast caches casts by tensor: a cast of one candidate's weights must not serve the next.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            self._random.restore()
            torch.clear_autocast_cache()
            self._modules.restore()
            self._frozen.restore()
            # A forward without a backward leaves whole parameters behind, and they would serve the next forward.
            self._reshard()

    def _reshard(self) -> None:
        """Free the whole parameters that a sharded model gathered for a forward; there are no others to free."""
        for module in self._sharded:
            module.reshard()


class RandomStreams:
    """Where torch's (on every initialised device), Python's and NumPy's random-number streams are as it is made."""

    def __init__(self) -> None:
        self._states = [(restore, state()) for state, restore in _random_streams()]

    def restore(self) -> None:
        """Put the streams back."""
        for restore, state in self._states:
            restore(state)


class ModuleStates:
    """What the modules of a model held when it was made: attributes, also in containers, and values of tensors.

    Args:
        modules: a model and all its submodules.
    """

    @torch.no_grad()
    def __init__(self, modules: Sequence[nn.Module]):
        containers: list[Any] = []
        tensors: dict[int, Tensor] = {}
        for module in modules:
            attributes = vars(module)
            containers.append(attributes)
            if isinstance(module._parameters, dict):  # that of a scripted module is none
                containers.append(module._parameters)
            own = [value for name, value in attributes.items() if name not in _TORCHS_OWN]
            _collect([module._buffers, *own], containers, tensors)
        self._containers = containers
        self._copies = [copy.copy(live) for live in containers]
        self._dicts = [live for live in containers if isinstance(live, dict)]
        self._held = self._lengths(), list(self._keys()), list(self._dict_values())
        self._parameters = [
            (parameter, parameter.requires_grad, parameter.data_ptr(), parameter.data)
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        self._values = Copies(list(tensors.values()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        if not self._hold_the_same():
            for live, saved in zip(self._containers, self._copies, strict=True):
                if not _holds_the_same(live, saved):
                    live.clear()
                    live.extend(saved) if isinstance(live, (list, deque)) else live.update(saved)
        for parameter, flag, address, data in self._parameters:
            if parameter.data_ptr() != address:
                parameter.data = data
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        self._values.restore()

    def _hold_the_same(self) -> bool:
        """Whether all containers hold the very objects that they held, as nearly always: in one pass, for speed."""
        lengths, keys, values = self._held
        return (
            self._lengths() == lengths
            and all(map(is_, self._keys(), keys))
            and all(map(is_, self._dict_values(), values))
        )

    def _lengths(self) -> list[int]:
        return list(map(len, self._containers))

    def _keys(self) -> Iterator[Any]:
        """Return the keys of the dicts, and what the others contain."""
        return chain.from_iterable(self._containers)

    def _dict_values(self) -> Iterator[Any]:
        return chain.from_iterable(map(methodcaller("values"), self._dicts))


_TORCHS_OWN = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})  # what most attributes are


def _collect(values: Iterable[Any], containers: list[Any], tensors: dict[int, Tensor], depth: int = 4) -> None:
    """Add what a closure could change in place: containers, those inside of them, and their tensors."""
    for value in values:
        if type(value) in _PLAIN:
            continue
        inside: Iterable[Any] | None = None
        if isinstance(value, Tensor):
            if _is_writable(value):
                tensors[id(value)] = value
        elif isinstance(value, (dict, list, deque, set)):
            containers.append(value)
            inside = value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            inside = value
        elif type(value).__name__ == "OrderedDictWrapper":  # the dicts of a scripted module are none
            inside = value.values()
        if depth and inside is not None:
            _collect(inside, containers, tensors, depth - 1)


def _holds_the_same(live: Any, saved: Any) -> bool:
    """Whether a container holds the very objects that its copy holds."""
    if len(live) != len(saved):
        return False
    if isinstance(live, set):
        return set(map(id, live)) == set(map(id, saved))
    same = all(map(is_, live, saved))
    return same and (not isinstance(live, dict) or all(map(is_, live.values(), saved.values())))


def _is_writable(tensor: Tensor) -> bool:
    """Whether in-place operations take the tensor; one that they refuse does not change."""
    if (
        type(tensor) is not Tensor and isinstance(tensor, nn.Parameter)
    ) or tensor.layout != torch.strided:  # parameters are kept elsewhere
        return False
    strides = tensor.stride()
    expanded = 0 in strides and any(s == 0 and size > 1 for s, size in zip(strides, tensor.shape, strict=True))
    return not expanded and not tensor.is_inference()


def _copies_of_frozen(parameters: Sequence[nn.Parameter]) -> Copies:
    """Return the values of those that are frozen, as a momentum encoder may change them in the forward.

    A model of which little is trained, such as one with adapters, has none and could not afford the copy.
    """
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    if not frozen:
        return Copies([])
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Copies([] if sum(parameter.numel() for parameter in frozen) > trained else frozen)


def check_repeatable(model: nn.Module, closure: Closure) -> None:
    """Run the closure twice at the same weights.

    Raises:
        ClosureError: if the two losses differ: then candidates cannot be compared.
    """
    with Isolation(model) as isolation:
        first, second = (isolation.run(closure).double().clone() for _ in range(2))
    # Some GPU operations add up in another order each time.
    if not torch.allclose(first, second, rtol=1e-3, atol=0.0, equal_nan=True):
        raise ClosureError(
            f"closure returned {first.item():.6g} and then {second.item():.6g} at the same weights; all candidates "
            "must see one batch: take it outside, as in `x, y = next(batches)` and then "
            "`scheduler.step(lambda: loss_fn(model(x), y))`"
        )


def scalar_loss(closure: Closure) -> Tensor:
    """Call the closure and return its loss as a 0-dim tensor, or say what is wrong with it."""
    try:
        loss = closure()
    except RuntimeError as error:
        if not torch.is_grad_enabled() and "does not require grad" in str(error):
            raise ClosureError(CALLED_BACKWARD) from error
        raise
    if not isinstance(loss, Tensor):
        raise ClosureError(
            f"closure returned {loss!r} ({type(loss).__name__}), not a loss tensor: {REMEDY}, without .item()"
        )
    if loss.numel() != 1:
        raise ClosureError(
            f"closure returned a tensor of shape {list(loss.shape)}, not a scalar: reduce it, e.g. .mean()"
        )
    if not loss.is_floating_point():
        raise ClosureError(f"closure returned a {loss.dtype} tensor: a loss is a real floating-point number")
    return loss.reshape(())


def _random_streams() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return how to read and how to set each random-number stream a closure may draw from."""
    streams: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if numpy := sys.modules.get("numpy"):
        streams.append((numpy.random.get_state, numpy.random.set_state))
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return streams
    module = torch.get_device_module(accelerator)
    if accelerator.type == "mps":
        streams.append((module.get_rng_state, module.set_rng_state))
    elif module.is_initialized():  # reading a state must not be what initialises a device
        streams += [
            (partial(module.get_rng_state, index), partial(module.set_rng_state, device=index))
            for index in range(module.device_count())
        ]
    return streams
