"""Branches shared out to ranks: each trains its own, and all get the survivors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .._machine.ranks import ProcessGroup, check_process_group, is_distributed

__all__ = ["Ranks"]


class Ranks:
    """The ranks that share a search; this process alone where ``torch.distributed`` is not initialised.

    How long one waits for another is the group's ``timeout``.

    Args:
        process_group: ``None`` is the default group.
    """

    def __init__(self, process_group: ProcessGroup | None = None):
        check_process_group(process_group)
        self._group = process_group
        self.count = dist.get_world_size(process_group) if is_distributed() else 1
        self.rank = dist.get_rank(process_group) if is_distributed() else 0
        # What the ranks tell each other, besides tensors of the models, is where the backend takes it.
        self._device = "cuda" if self.count > 1 and "nccl" in dist.get_backend(process_group) else "cpu"

    @property
    def position(self) -> list[int]:
        """This rank, and how many there are."""
        return [self.rank, self.count]

    def share(self, branches: int, rank: int | None = None) -> range:
        """Return the indices of the branches that a rank trains, by default this one; the first have one more."""
        rank = self.rank if rank is None else rank
        each, more = divmod(branches, self.count)
        start = rank * each + min(rank, more)
        return range(start, start + each + (rank < more))

    def gather_losses(self, losses: Tensor, branches: int) -> list[float]:
        """Return the losses of so many branches on all ranks, given those of this rank's share.

        Raises:
            RuntimeError: if a rank is gone; names it.
        """
        if self.count == 1:
            return losses.tolist()
        # Not a collective: if that fails, nobody can tell by whom. One more number, as a share may be empty.
        sizes = [1 + len(self.share(branches, rank)) for rank in range(self.count)]
        messages = [torch.zeros(size, dtype=losses.dtype, device=self._device) for size in sizes]
        messages[self.rank][1:] = losses
        gone: dict[int, str] = {}
        works = []
        for rank in range(self.count):
            if rank != self.rank:
                try:
                    works.append((rank, dist.isend(messages[self.rank], group=self._group, group_dst=rank)))
                    works.append((rank, dist.irecv(messages[rank], group=self._group, group_src=rank)))
                except RuntimeError as error:
                    gone.setdefault(rank, str(error))
        for rank, work in works:
            try:
                assert work is not None  # this process is one of the group
                work.wait()
            except RuntimeError as error:
                gone.setdefault(rank, str(error))
        if gone:
            ranks = ", ".join(map(str, gone))
            raise RuntimeError(
                f"rank {ranks} did not end the epoch (rank {self.rank} saw: {next(iter(gone.values()))}). Load the "
                "state that was saved after an epoch, on any number of ranks, to go on from there"
            )
        return torch.cat([message[1:] for message in messages]).tolist()

    def broadcast_survivors(self, tensors: Sequence[Tensor], survivors: Sequence[int], branches: int) -> None:
        """Let the first rows of stacked tensors, which are this rank's share of the branches, be the survivors'."""
        owners = {index: rank for rank in range(self.count) for index in self.share(branches, rank)}
        first = self.share(branches).start
        for tensor in tensors:
            kept = tensor.new_empty((len(survivors), *tensor.shape[1:]))
            for row, index in zip(kept, survivors, strict=True):
                if owners[index] == self.rank:
                    row.copy_(tensor[index - first])
                if self.count > 1:
                    dist.broadcast(row, group=self._group, group_src=owners[index])
            tensor[: len(survivors)] = kept

    def values_of_first(self, tensor: Tensor) -> Tensor:
        """Return the first rank's values of a tensor on the host that every rank has."""
        if self.count == 1:
            return tensor
        told = tensor.to(self._device, copy=True)
        dist.broadcast(told, group=self._group, group_src=0)
        return told.cpu()
