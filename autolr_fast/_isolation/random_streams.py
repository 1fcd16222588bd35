"""Where random-number streams are, and how they are put back."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

__all__ = ["RandomStreams"]


class RandomStreams:
    """Where torch's (on every initialised device), Python's and NumPy's random-number streams are as it is made."""

    def __init__(self) -> None:
        self._states = [(restore, state()) for state, restore in _random_streams()]

    def restore(self) -> None:
        """Put the streams back."""
        for restore, state in self._states:
            restore(state)


def _random_streams() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return how to read and how to set each random-number stream a closure may draw from."""
    streams: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if "numpy" in sys.modules:
        streams.append((_NUMPY.state, _NUMPY.restore))
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


class _NumPyStream:
    """NumPy's stream: to read its state takes 50 us, and to set it too, so both are left out where it stands still.

    It stands still if the memory of its generator does. The one exception is a second normal number in store, which
    is no part of that memory: a state that has one is read and set each time.
    """

    def __init__(self) -> None:
        self._known: tuple[bytes, Any] | None = None  # memory, and the state that was read there
        self._is_drawn_from = False  # by closures

    def state(self) -> tuple[bytes | None, Any]:
        """Return the memory, if it shows whether the stream stands still, and the state."""
        memory = _memory_of_numpys_generator()
        if self._known is not None and self._known[0] == memory:
            return self._known
        state = sys.modules["numpy"].random.get_state()
        if memory is None:
            return None, state
        _, keys, position, has_normal, _ = state
        if has_normal or memory != keys.tobytes() + position.to_bytes(4, sys.byteorder):
            return None, state
        if not self._is_drawn_from:
            self._known = memory, state
        return memory, state

    def restore(self, saved: tuple[bytes | None, Any]) -> None:
        """Put the stream back to what :meth:`state` returned."""
        memory, state = saved
        if memory is not None:
            if memory == _memory_of_numpys_generator():
                return
            self._known, self._is_drawn_from = None, True
        sys.modules["numpy"].random.set_state(state)


_NUMPY = _NumPyStream()


def _memory_of_numpys_generator() -> bytes | None:
    """Return the 624 keys and the position of the Mersenne twister; ``None`` if NumPy is older, or has another."""
    find = getattr(sys.modules["numpy"].random, "get_bit_generator", None)
    generator: Any = find and find()
    if type(generator).__name__ != "MT19937":
        return None
    return ctypes.string_at(generator.ctypes.state_address, 4 * 625)
