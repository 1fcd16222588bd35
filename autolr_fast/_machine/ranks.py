"""Several ranks: what is decided from is averaged first, so that every rank decides the same; sharded models."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule
else:
    ProcessGroup = object  # torch builds without distributed support have no such class

__all__ = ["ProcessGroup", "is_distributed", "is_sharded", "local", "mean_over_ranks", "sharded_modules"]


def is_distributed() -> bool:
    """Whether there may be other ranks."""
    return dist.is_available() and dist.is_initialized()


def mean_over_ranks(tensor: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Return the mean of ``tensor`` over the ranks of the group, the same bits on each; alone, ``tensor``.

    Args:
        tensor: any shape, the same on every rank.
        process_group: ``None`` is the default group.
    """
    if not is_distributed():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=process_group)
    return total / dist.get_world_size(process_group)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard if it is sharded, else all of it; of the same memory."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard.detach()


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`torch.distributed.fsdp.fully_shard` was applied to the model or a part of it."""
    return bool(sharded_modules(model.modules()))


def sharded_modules(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """Return those of the modules that :func:`torch.distributed.fsdp.fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    return [module for module in modules if isinstance(module, fsdp.FSDPModule)] if fsdp else []
