"""What is measured: the GPU where there is one, else the CPU."""

from __future__ import annotations

import torch

__all__ = ["DEVICE", "device_name", "wait"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """Return the name of the GPU, or ``"cpu"``."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def wait() -> None:
    """Wait until the device has finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
