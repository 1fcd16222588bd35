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

__all__ = [
    "ProcessGroup",
    "check_process_group",
    "check_shards",
    "is_distributed",
    "is_sharded",
    "local",
    "mean_over_ranks",
    "shard_of",
    "sharded_modules",
]


def is_distributed() -> bool:
    """Whether there may be other ranks."""
    return dist.is_available() and dist.is_initialized()


def check_process_group(process_group: object) -> None:
    """Raise a TypeError if something is no process group."""
    if process_group is None or (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        return
    raise TypeError(
        f"process_group={process_group!r}: expected a group as torch.distributed.new_group returns it, or None for "
        "the default group"
    )


def mean_over_ranks(tensor: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Return the mean of ``tensor`` over the ranks of the group, the same bits on each; alone, ``tensor``.

    Args:
        tensor: any shape, the same on every rank.
        process_group: ``None`` is the default group.

    Raises:
        RuntimeError: if the other ranks do not come within the time-out of the group.
    """
    if not is_distributed():
        return tensor
    total = tensor.clone()
    ranks = dist.get_world_size(process_group)
    try:
        dist.all_reduce(total, group=process_group)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(process_group)} of {ranks} has losses to average, and not all of the other ranks "
            "came: every rank calls scheduler.loss and scheduler.step for each optimizer step, and "
            f"scheduler.watch as often ({error})"
        ) from error
    return total / ranks


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard if it is sharded, else all of it; of the same memory."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard.detach()


def shard_of(parameters: Iterable[Tensor]) -> list[int]:
    """Return which shard of the parameters this rank holds: its rank and how many there are; [] if it holds all."""
    if any(hasattr(parameter, "to_local") for parameter in parameters):
        return [dist.get_rank(), dist.get_world_size()]
    return []


def check_shards(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raise a TypeError if FSDP version 1 shards the model: what is written to its parameters is lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    wraps = fsdp is not None and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in model.modules())
    if wraps or any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise TypeError(
            f"model={type(model).__name__} is sharded by FullyShardedDataParallel (FSDP version 1), which keeps "
            "its parameters elsewhere: shard it by torch.distributed.fsdp.fully_shard (FSDP version 2) instead"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`torch.distributed.fsdp.fully_shard` was applied to the model or a part of it."""
    return bool(sharded_modules(model.modules()))


def sharded_modules(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """Return those of the modules that :func:`torch.distributed.fsdp.fully_shard` was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    return [module for module in modules if isinstance(module, fsdp.FSDPModule)] if fsdp else []
