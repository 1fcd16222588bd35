"""Torch's random numbers, as plain tensors that a checkpoint can hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RandomNumbers", "RandomState"]

RandomState = dict[str, Tensor]
"""Where random numbers are, by where they come from."""


class RandomNumbers:
    """Torch's random numbers on the host and on a model's device, and those of a generator.

    Args:
        model: its first parameter tells the device.
        generator: one of the user's.

    Raises:
        TypeError: if the generator is none.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator | None = None):
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator={generator!r}: expected the torch.Generator that shuffles the batches")
        self._device = next(model.parameters()).device
        self._generator = generator

    def state(self) -> RandomState:
        """Return where they are."""
        state = {"cpu": torch.get_rng_state()}
        if self._device.type not in ("cpu", "meta"):
            state["device"] = torch.get_device_module(self._device).get_rng_state(self._device)
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
        return state

    def restore(self, state: RandomState) -> None:
        """Go back to a state, as far as it tells."""
        torch.set_rng_state(state["cpu"].cpu())
        if "device" in state:
            torch.get_device_module(self._device).set_rng_state(state["device"].cpu(), self._device)
        if self._generator is not None and "generator" in state:
            self._generator.set_state(state["generator"].cpu())
