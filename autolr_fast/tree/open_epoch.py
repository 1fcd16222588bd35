"""An epoch that has not ended, so that another process can end it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks
from .records import Branch

__all__ = ["OpenEpoch", "random_state", "set_random_state"]


class OpenEpoch:
    """What an epoch that has not ended has seen.

    Args:
        random: the random-number state before its first batch was fetched, if that is known.
    """

    def __init__(self, random: dict[str, Tensor] | None):
        self.start = random
        self.now = random or {}  # after the last step; what was fetched since is fetched again by who goes on
        self.branches: list[Branch] = []  # none until there is a batch
        self.totals = torch.zeros(0, dtype=torch.float64)  # sums of losses, of this rank's share
        self.examples = 0
        self.batches = 0

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """Return it as plain values and tensors."""
        return {
            "start": self.start,
            "now": dict(self.now),
            "branches": [[branch.parent, branch.lr] for branch in self.branches],
            "totals": self.totals.clone(),
            "examples": self.examples,
            "batches": self.batches,
            "rank": [ranks.rank, ranks.count],
        }

    @classmethod
    def of(cls, state: dict[str, Any], ranks: Ranks) -> OpenEpoch:
        """Return the one that :meth:`state_dict` is of.

        Raises:
            ValueError: if it is of another rank.
        """
        if state["rank"] != [ranks.rank, ranks.count]:
            rank, count = state["rank"]
            raise ValueError(
                f"state_dict is of rank {rank} of {count} within an epoch, and this is rank {ranks.rank} of "
                f"{ranks.count}: give each rank its own, or one that was saved between two epochs"
            )
        opened = cls(state["start"])
        opened.now = dict(state["now"])
        opened.branches = [Branch(parent, lr, math.nan) for parent, lr in state["branches"]]
        opened.totals = state["totals"].clone()
        opened.examples, opened.batches = state["examples"], state["batches"]
        return opened


def random_state(device: torch.device, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Return the state of torch's random numbers, on the host and a device, and of a generator."""
    state = {"cpu": torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    if generator is not None:
        state["generator"] = generator.get_state()
    return state


def set_random_state(
    state: dict[str, Tensor], device: torch.device, generator: torch.Generator | None = None
) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
    if generator is not None and "generator" in state:
        generator.set_state(state["generator"].cpu())
