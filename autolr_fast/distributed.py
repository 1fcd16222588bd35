"""Agreement between ranks: what is decided from is averaged first, so that every rank decides the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = object  # torch builds without distributed support have no such class

__all__ = ["ProcessGroup", "mean_over_ranks"]


def mean_over_ranks(tensor: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Return the mean of ``tensor`` over the ranks of the group, the same bits on each; alone, ``tensor``.

    Args:
        tensor: any shape, the same on every rank.
        process_group: ``None`` is the default group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=process_group)
    return total / dist.get_world_size(process_group)
