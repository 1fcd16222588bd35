"""What is measured: the GPU where there is one, else the CPU."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["DEVICE", "about", "wait"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def about() -> dict[str, Any]:
    """Return what each row says of where it was measured: the GPU's name or ``"cpu"``, torch, and threads."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def wait() -> None:
    """Wait until the device has finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
