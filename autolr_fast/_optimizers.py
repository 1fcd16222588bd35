"""The optimizers of one model, taken as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Optimizers"]


class Optimizers:
    """One optimizer, or several that train parts of one model, and their param groups in the order they came.

    Args:
        given: an optimizer, or a list of them. A wrapper that has no hooks of its own, such as Accelerate's, stands
            for the one in its ``.optimizer``.

    Raises:
        TypeError: if something else is given.
        ValueError: if their steps cannot be scaled, or scaled together.
    """

    def __init__(self, given: object):
        several = list(given) if isinstance(given, (list, tuple)) else [given]
        if not several:
            raise ValueError(f"optimizer={given!r} is empty: give one optimizer, or a list of those of the model")
        self._all = [_checked(_unwrapped(each)) for each in several]
        self._places: list[tuple[int, int]] = []  # of each param group: index of the optimizer, and in it
        self._counts: list[int] = []  # of the groups of each optimizer that have a place
        if len(set(map(id, self._all))) < len(self._all):
            raise ValueError("optimizer: the list has one optimizer twice; list each once")
        if len({bool(group.get("maximize", False)) for group in self.param_groups}) > 1:
            raise ValueError(
                "optimizer has maximize=True in some param groups only: one closure cannot be both better higher "
                "and better lower; negate the loss of one part instead"
            )

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups: those of the first optimizer at first, and last those that were added last."""
        if len(self._all) == 1:
            return self._all[0].param_groups
        return [self._all[optimizer].param_groups[index] for optimizer, index in self.places()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def places(self) -> list[tuple[int, int]]:
        """Return where each param group is: the index of its optimizer, and its index there.

        Raises:
            ValueError: if a group is gone.
        """
        counts = [len(optimizer.param_groups) for optimizer in self._all]
        if counts == self._counts:  # as nearly always: it is asked at every step
            return self._places
        now = [(n, index) for n, count in enumerate(counts) for index in range(count)]
        known = set(self._places)
        if not known <= set(now):
            raise ValueError(
                f"the optimizer has {len(now)} param groups and had {len(known)}: groups can be added, not "
                "removed; freeze their parameters with requires_grad_(False) instead"
            )
        self._places += [place for place in now if place not in known]
        self._counts = counts
        return self._places

    def load_places(self, places: Sequence[Sequence[int]]) -> None:
        """Take over the order that :meth:`places` returned where a state was saved.

        Raises:
            ValueError: if it is of other param groups.
        """
        loaded = [(optimizer, index) for optimizer, index in places]
        if sorted(loaded) != sorted(self.places()):
            raise ValueError(
                f"state_dict is of {len(loaded)} param groups and the optimizer has {len(self._places)}: give the "
                "optimizer the same groups before loading"
            )
        self._places = loaded

    def group_name(self, index: int) -> str:
        """Return what a user calls the param group at an index."""
        optimizer, own = self.places()[index]
        return f"optimizer{f'[{optimizer}]' * (len(self._all) > 1)}.param_groups[{own}]"


def names_of(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Return the names of the classes of optimizers, to tell of them."""
    return " and ".join(type(optimizer).__name__ for optimizer in optimizers)


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer whose steps can be seen: a wrapper without hooks calls the step of the one it holds."""
    while "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {}):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


def _checked(optimizer: Any) -> torch.optim.Optimizer:
    """Return an optimizer whose steps can be scaled; raise a TypeError or ValueError if they cannot."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r}: expected a torch.optim.Optimizer, or a list of them; the closure goes to "
            "loss(), as in AutoLR(optimizer, model) and scheduler.loss(closure)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its step is a whole search of its own, which its lr does not "
            "scale; use it without AutoLR (line_search_fn='strong_wolfe'), or another optimizer"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "optimizer has differentiable=True, and its step becomes part of an autograd graph that writing "
            "candidates would break; build it with differentiable=False"
        )
    return optimizer
