"""How the learning rate is chosen: this package, torch's schedules, and optimizers that need none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from autolr_fast import AutoLR
from autolr_fast.demo import BASELINES

from .variants import VARIANTS, method_with

__all__ = ["METHODS", "OPTIMIZERS", "Training"]

Closure = Callable[[], Tensor]

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}
"""SGD, SGD with momentum 0.9, AdamW: all else as torch has it."""


class Training:
    """A network's training by an optimizer and a schedule, step by step.

    Args:
        optimizer: it takes the steps.
        scheduler: moves its learning rate after each, if there is one.

    Attributes:
        scheduling: seconds spent in the scheduler.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None = None):
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scheduling = 0.0

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, closure: Closure) -> Tensor:
        """Take a step on the batch whose loss the closure returns; return the loss before it."""
        self.optimizer.zero_grad()
        loss = closure()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        start = time.perf_counter()
        self._schedule(closure, loss.detach())
        self.scheduling += time.perf_counter() - start
        return loss.detach()

    def tested(self, model: nn.Module) -> nn.Module:
        """Return the network that is to be tested at the end."""
        return model

    def _schedule(self, closure: Closure, loss: Tensor) -> None:
        if isinstance(self.scheduler, AutoLR):
            self.scheduler.step(closure)
        elif self.scheduler is not None:
            self.scheduler.step()


class Plateau(Training):
    """ReduceLROnPlateau on the mean training loss of each twentieth of the training."""

    def __init__(self, optimizer: Optimizer, total: int):
        super().__init__(optimizer)
        self._plateau = ReduceLROnPlateau(optimizer, patience=1)
        self._every = max(1, total // 20)
        self._losses: list[float] = []

    def _schedule(self, closure: Closure, loss: Tensor) -> None:
        self._losses.append(loss.item())
        if len(self._losses) == self._every:
            self._plateau.step(sum(self._losses) / self._every)
            self._losses.clear()


class ScheduleFree(Training):
    """An optimizer that is tested at an average of its parameters: it has ``train()`` and ``eval()``."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        optimizer.train()

    def tested(self, model: nn.Module) -> nn.Module:
        """Return the network with the averaged parameters."""
        self.optimizer.eval()  # type: ignore[attr-defined]
        return model


class Averaged(Training):
    """DoG, which is tested at its polynomial average."""

    def __init__(self, optimizer: Optimizer, averager: Any):
        super().__init__(optimizer)
        self._averager = averager

    def _schedule(self, closure: Closure, loss: Tensor) -> None:
        self._averager.step()

    def tested(self, model: nn.Module) -> nn.Module:
        """Return the averaged network."""
        return self._averager.averaged_model


class LineSearch(Training):
    """SaLSA, whose step evaluates the closure and calls backward itself."""

    @property
    def lr(self) -> float:
        """The step size."""
        return float(self.optimizer.step_size)  # type: ignore[attr-defined]

    def step(self, closure: Closure) -> Tensor:
        """Take a step; the loss is that before it."""
        self.optimizer.zero_grad()

        def evaluate(backwards: bool = False) -> Tensor:
            loss = closure()
            if backwards:
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        try:
            return self.optimizer.step(evaluate).detach()  # type: ignore[arg-type, union-attr]
        except ValueError:  # it found parameters that are not numbers
            return torch.tensor(math.nan)


Build = Callable[[nn.Module, str, float, int], Training]
"""From model, name of the optimizer, lr0 and the number of steps to a training."""


def _scheduled(make: Callable[[Optimizer, float, int], LRScheduler]) -> Build:
    def build(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
        optim = OPTIMIZERS[optimizer](model.parameters(), lr=lr)
        return Training(optim, make(optim, lr, total))

    return build


def _one_cycle(optim: Optimizer, lr: float, total: int) -> OneCycleLR:
    plain = optim.param_groups[0].get("momentum") == 0.0  # it would give SGD a momentum to cycle
    return OneCycleLR(optim, max_lr=lr, total_steps=total + 1, cycle_momentum=not plain)


def _auto(kind: Callable[..., AutoLR] = AutoLR, **options: Any) -> Build:
    def build(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
        optim = OPTIMIZERS[optimizer](model.parameters(), lr=lr)
        annealing = {} if kind == AutoLR.paper else {"total_steps": total}
        return Training(optim, kind(optim, model, **{"evaluator": "inplace", **annealing, **options}))

    return build


def _plateau(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    return Plateau(OPTIMIZERS[optimizer](model.parameters(), lr=lr), total)


def _d_adaptation(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from dadaptation import DAdaptAdam, DAdaptSGD  # noqa: PLC0415

    if optimizer == "AdamW":
        optim = DAdaptAdam(model.parameters(), lr=lr, weight_decay=0.01, decouple=True)
    else:
        optim = DAdaptSGD(model.parameters(), lr=lr, momentum=0.9 if optimizer == "momentum" else 0.0)
    return Training(optim, BASELINES["cosine"](optim, total))


def _prodigy(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from prodigyopt import Prodigy  # noqa: PLC0415

    optim = Prodigy(model.parameters(), lr=lr, weight_decay=0.01)
    return Training(optim, BASELINES["cosine"](optim, total))


def _schedule_free(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from schedulefree import AdamWScheduleFree, SGDScheduleFree  # noqa: PLC0415

    if optimizer == "AdamW":
        return ScheduleFree(
            AdamWScheduleFree(model.parameters(), lr=lr, weight_decay=0.01, warmup_steps=total // 20)
        )
    return ScheduleFree(SGDScheduleFree(model.parameters(), lr=lr, warmup_steps=total // 20))


def _dog(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from dog import DoG, PolynomialDecayAverager  # noqa: PLC0415

    return Averaged(DoG(model.parameters(), lr=lr), PolynomialDecayAverager(model))


def _salsa(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from salsa.SaLSA import SaLSA  # noqa: PLC0415

    return LineSearch(SaLSA(model.parameters(), init_step_size=lr))


METHODS: Mapping[str, Build] = {
    "AutoLR": _auto(),
    **{method_with(name): _auto(kind, **options) for name, (kind, options) in VARIANTS.items()},
    **{name: _scheduled(lambda optim, _, total, make=make: make(optim, total)) for name, make in BASELINES.items()},
    "one cycle": _scheduled(_one_cycle),
    "plateau": _plateau,
    "D-Adaptation": _d_adaptation,
    "Prodigy": _prodigy,
    "Schedule-Free": _schedule_free,
    "DoG": _dog,
    "SaLSA": _salsa,
}
