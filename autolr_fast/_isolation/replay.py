"""The loss of a training step, computed again as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .binding import bound
from .closures import Closure, scalar_loss
from .held import Held, Versions, held_by, modules_beside
from .probed import Probed
from .random_streams import RandomStreams

__all__ = ["Replay"]


class Replay(Probed):
    """A closure: the mean loss of the micro-batches of one training step, each as it was in training.

    Each starts from the random-number streams, the autocast state and the train or eval modes that it started from
    in training, and reads the variables that it read there. It is to be called inside an :class:`Isolation`, which
    puts streams and modes back.

    Args:
        model: whose modes are replayed, with those of all submodules.
    """

    rewinds = True

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._parts: list[_Part] = []

    def add(self, closure: Closure) -> None:
        """Remember a closure, and where everything stands; call it before the closure runs in training."""
        modes = [module.training for module in self._modules]
        held = held_by(closure)
        self._parts.append(
            _Part(bound(closure), held, Versions(held), RandomStreams(), _autocasts(), self._modules, modes)
        )

    def check_last(self) -> None:
        """Raise a ClosureError if the closure that was added last wrote to a tensor that it holds."""
        part = self._parts[-1]
        part.versions.check([*self._modules, *modules_beside(self._modules, part.held)])

    def drop_last(self) -> None:
        """Forget the closure that was added last."""
        del self._parts[-1:]

    def rewind(self) -> None:
        """Put streams and modes to where the first micro-batch began."""
        self._parts[0].rewind()

    def run(self) -> Tensor:
        """Return the loss of the first micro-batch, from where the streams and modes are."""
        return self._parts[0].loss()

    def __len__(self) -> int:
        return len(self._parts)

    def held(self) -> Held:
        """Return what the closures can reach."""
        parts = [part.held for part in self._parts]
        modules = dict.fromkeys(module for held in parts for module in held.modules)
        tensors = {id(tensor): (name, tensor) for held in parts for name, tensor in held.tensors}
        return Held(list(modules), list(tensors.values()))

    def __call__(self) -> Tensor:
        losses = []
        for part in self._parts:
            part.rewind()
            # Not the graphs of all at once.
            losses.append(part.loss().detach() if self.needs_gradients else part.loss())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


class _Autocast(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype


class _Part(NamedTuple):
    closure: Closure
    held: Held
    versions: Versions
    streams: RandomStreams
    autocasts: Sequence[_Autocast]
    modules: Sequence[nn.Module]
    modes: Sequence[bool]

    def rewind(self) -> None:
        self.streams.restore()
        for module, mode in zip(self.modules, self.modes, strict=True):
            if module.training != mode:
                module.training = mode

    def loss(self) -> Tensor:
        found = _autocasts()
        if found == self.autocasts:
            return scalar_loss(self.closure)
        with ExitStack() as stack:
            for then, now in zip(self.autocasts, found, strict=True):
                if then != now:
                    stack.enter_context(torch.autocast(then.device_type, then.dtype, enabled=then.enabled))
            return scalar_loss(self.closure)


def _autocasts() -> tuple[_Autocast, ...]:
    return tuple(
        _Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _device_types()
    )


def _device_types() -> Iterator[str]:
    yield "cpu"
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        yield accelerator.type
