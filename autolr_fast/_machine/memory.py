"""What memory there is, and whether it has run out."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["SMALL", "are_small", "check_max_memory", "free_memory", "is_out_of_memory"]

SMALL = 16 << 20
"""Bytes that count for little on any device."""
_SMALL_SHARE = 0.01  # of a GPU's memory


def check_max_memory(max_memory: int | None) -> int | None:
    """Return the argument, as Python's number.

    Raises:
        ValueError: if it is neither a positive whole number of bytes nor ``None``.
    """
    if max_memory is None:
        return None
    if not isinstance(max_memory, Integral) or isinstance(max_memory, bool) or max_memory <= 0:
        raise ValueError(f"max_memory={max_memory!r}: give a positive whole number of bytes, or None")
    return int(max_memory)


def free_memory(device: torch.device) -> int:
    """Return the bytes free on a device; more than there can be where that cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return sys.maxsize


def are_small(tensors: Iterable[Tensor]) -> bool:
    """Whether a copy of the tensors costs little: 16 MiB at most, or on a GPU a hundredth of its memory."""
    sizes: dict[torch.device, int] = defaultdict(int)
    for tensor in tensors:
        sizes[tensor.device] += tensor.numel() * tensor.element_size()
    return all(size <= SMALL or size <= _SMALL_SHARE * _gpu_memory(device) for device, size in sizes.items())


@cache
def _gpu_memory(device: torch.device) -> int:
    """Return the bytes that a GPU has; 0 of another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was not memory enough, of the host or a device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)
