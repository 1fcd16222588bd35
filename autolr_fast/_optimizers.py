"""The optimizers of one model, taken as one."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

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
        self._held: list[list[nn.Parameter]] = []  # the parameters of each group, as the optimizers have them
        self._lists: dict[tuple[int, int], list[nn.Parameter]] = {}  # the same by place
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

    def have_trained(self) -> bool:
        """Whether one of them has stepped before, as its state or another scheduler that had it shows."""
        return any(map(_has_trained, self._all))

    def places(self) -> list[tuple[int, int]]:
        """Return where each param group is: the index of its optimizer, and its index there.

        Raises:
            ValueError: if a group is gone.
        """
        held = [group["params"] for optimizer in self._all for group in optimizer.param_groups]
        if len(held) == len(self._held) and all(map(is_, held, self._held)):  # as nearly always: at every step
            return self._places
        now = [(n, index) for n, each in enumerate(self._all) for index in range(len(each.param_groups))]
        lists = dict(zip(now, held, strict=True))
        if any(lists.get(place) is not params for place, params in self._lists.items()):
            raise ValueError(
                f"the optimizer has {len(now)} param groups and had {len(self._lists)}, and one of those is gone: "
                "groups can be added, not removed or replaced; freeze their parameters with requires_grad_(False)"
            )
        self._places += [place for place in now if place not in self._lists]
        self._held, self._lists = held, lists
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

    def is_making_states(self) -> bool:
        """Whether rates and gradients are 0, as where ``torch.distributed.checkpoint`` steps to make states."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return bool(gradients) and not any(bool(each.detach().any()) for each in gradients)

    def names(self) -> list[str]:
        """Return the names of their classes."""
        return [type(optimizer).__name__ for optimizer in self._all]

    def check_names(self, names: Sequence[str]) -> None:
        """Raise a ValueError if a state is of other optimizers."""
        if len(names) == len(self) and names != self.names():
            raise ValueError(
                f"state_dict is of {' and '.join(names)}, and the optimizer is {names_of(self)}: a "
                "learning rate of one means nothing to the other, so do not load the state"
            )

    def unread_scales(self) -> str:
        """Return what to tell of ``lr_scale`` in param groups, which timm's schedulers read and none of torch."""
        rates = {str(group["lr"]) for group in self.param_groups}
        for index, group in enumerate(self.param_groups):
            if group.get("lr_scale", 1.0) != 1.0 and len(rates) == 1:
                return (
                    f"{self.group_name(index)} has lr_scale={group['lr_scale']}, which AutoLR does not read: give "
                    "each group lr * lr_scale as its lr"
                )
        return ""

    def another_scheduler(self) -> str:
        """Return what to tell if another scheduler has changed a learning rate before the first step."""
        for index, group in enumerate([] if self.have_trained() else self.param_groups):
            rate, first = float(group["lr"]), float(group.get("initial_lr", group["lr"]))
            if rate != first:
                return (
                    f"the lr of {self.group_name(index)} is {rate:.6g}, and its initial_lr {first:.6g}: another "
                    "scheduler, such as a warm-up, has this optimizer. AutoLR starts from initial_lr, and needs no "
                    "warm-up: remove the other scheduler"
                )
        return ""

    def group_name(self, index: int) -> str:
        """Return what a user calls the param group at an index."""
        optimizer, own = self.places()[index]
        return f"optimizer{f'[{optimizer}]' * (len(self._all) > 1)}.param_groups[{own}]"


def names_of(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Return the names of the classes of optimizers, to tell of them."""
    return " and ".join(type(optimizer).__name__ for optimizer in optimizers)


def _has_trained(optimizer: torch.optim.Optimizer) -> bool:
    if getattr(optimizer, "_opt_called", False):  # torch's schedulers note it, for optimizers without a state
        return True
    return any(map(_is_of_a_step, optimizer.state.values()))


def _is_of_a_step(state: Any) -> bool:
    """Whether an entry of a state has seen a step: some optimizers make theirs, of zeros, before the first."""
    if not isinstance(state, dict):
        return False
    if "step" in state:
        return float(state["step"]) > 0
    return any(isinstance(value, Tensor) and bool(value.any()) for value in state.values())


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer whose steps can be seen: a wrapper without hooks calls the step of the one it holds."""
    if isinstance(optimizer, LRScheduler):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, a scheduler: give its optimizer")
    while "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {}):
        inner = next((getattr(optimizer, name) for name in _INSIDE if getattr(optimizer, name, None)), None)
        if inner is None:
            break
        optimizer = inner
    return optimizer


_INSIDE = ("optimizer", "original_optimizer", "base_optimizer")  # what wrappers call what they wrap


def _checked(optimizer: Any) -> torch.optim.Optimizer:
    """Return an optimizer whose steps can be scaled; raise a TypeError or ValueError if they cannot."""
    if isinstance(optimizer, nn.Module):
        raise TypeError("optimizer is a model: give the optimizer first, as in AutoLR(optimizer, model)")
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
    if not _scales(optimizer):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its steps do not follow the lr of their param group, which is "
            "all that AutoLR sets; use the optimizer without AutoLR, or take another one"
        )
    if isinstance(optimizer, torch.optim.Adafactor) and any(
        float(group["lr"]) > 1 for group in optimizer.param_groups
    ):
        raise ValueError(
            "optimizer=Adafactor takes 1 / sqrt(step) in place of an lr above that, and its first step does not "
            "follow an lr above 1: start at 1 or below"
        )
    if not (hasattr(optimizer.step, "__func__") or hasattr(optimizer.step, "_wrapped_by_lr_sched")):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: its step was replaced by a function, as by "
            "torch.compile(optimizer.step). Build AutoLR before that"
        )
    if any("d" in group and ("growth_rate" in group or "d0" in group) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer={type(optimizer).__name__} finds a rate of its own, and multiplies lr by it: use the "
            "optimizer without AutoLR at lr=1, or take another one"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "optimizer has differentiable=True, and its step becomes part of an autograd graph that writing "
            "candidates would break; build it with differentiable=False"
        )
    return optimizer


def _scales(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the steps of an optimizer's kind scale with the learning rate, as a trial on a few numbers shows.

    Also if that cannot be tried: if the optimizer holds more than plain values, which the trial might change.
    """
    if type(optimizer).__module__.startswith("torch.optim."):
        return not isinstance(optimizer, (torch.optim.Rprop, torch.optim.ASGD))  # whose steps follow one later
    plain = vars(torch.optim.SGD([torch.zeros(1)])).keys() | {"step"}  # which torch's schedulers wrap
    own = vars(optimizer).keys() - plain
    if not all(isinstance(vars(optimizer)[name], (int, float, str, type(None))) for name in own):
        return True
    try:
        with torch.random.fork_rng(devices=()):
            long, short = (_length_of_last_step(optimizer, rate) for rate in (1e-2, 1e-5))
    except Exception:  # of an optimizer that wants parameters of its own kind
        return True
    return not short > 0.1 * long


def _length_of_last_step(optimizer: torch.optim.Optimizer, rate: float, steps: int = 12) -> float:
    """Return how far the last step goes, if all but the first are taken at a rate."""
    parameter = nn.Parameter(torch.linspace(-1.0, 1.0, 16).view(4, 4))
    parameter.grad = torch.linspace(1.0, 2.0, 16).view(4, 4)
    trial: torch.optim.Optimizer = object.__new__(type(optimizer))
    options = {name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "lr")}
    group = {**copy.deepcopy(options), "params": [parameter], "lr": 1e-2}
    fresh = {"state": defaultdict(dict), "param_groups": [group]}
    hooks: dict[str, Any] = {
        name: OrderedDict() for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    }
    vars(trial).update({**vars(optimizer), **fresh, **hooks})
    before = parameter.detach().clone()
    for _ in range(steps):
        before.copy_(parameter.detach())
        type(optimizer).step(trial)
        group["lr"] = rate
    return float((parameter.detach() - before).norm())
