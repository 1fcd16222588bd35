"""Where random-number streams are, and how they are put back."""

from __future__ import annotations

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
