"""How the learning rate is chosen: this package, torch's schedules, and optimizers that need none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from autolr_fast import AutoLR
from autolr_fast.demo import BASELINES

from .variants import VARIANTS, method_with

__all__ = ["AFTER_STEP", "HELD_BACK", "METHODS", "MUON_AND_ADAMW", "OPTIMIZERS", "WARMED_UP", "Training"]

Closure = Callable[[], Tensor]

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}
"""SGD, SGD with momentum 0.9, AdamW: all else as torch has it."""
MUON_AND_ADAMW = "Muon and AdamW"
"""Two optimizers of one learning rate, Muon of the blocks' matrices and AdamW of the rest: for transformers."""
AFTER_STEP = method_with("closure after the step")
"""AutoLR that is given the closure after the step, so that its probes draw noise of their own."""
HELD_BACK = "AutoLR, held back"
"""AutoLR that watches the loss of a tenth of the training examples, and stops when it has annealed."""
WARMED_UP = "linear with warm-up"
"""Up in a straight line over a twentieth of the steps, then down to zero."""


class Training:
    """A network's training by its optimizers and their schedules, step by step.

    Args:
        optimizers: they take the steps, at one learning rate.
        schedulers: they move it after each.

    Attributes:
        scheduling: seconds spent in the schedulers.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler] = ()):
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.scheduling = 0.0

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    @property
    def has_ended(self) -> bool:
        """Whether the training is at an end before its last step."""
        return False

    def watch(self, loss: Tensor) -> None:
        """See the loss on examples held back."""

    def step(self, closure: Closure) -> Tensor:
        """Take a step on the batch whose loss the closure returns; return the loss before it."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self._loss(closure)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        start = time.perf_counter()
        self._schedule(closure, loss.detach())
        self.scheduling += time.perf_counter() - start
        return loss.detach()

    def tested(self, model: nn.Module) -> nn.Module:
        """Return the network that is to be tested at the end."""
        return model

    def _loss(self, closure: Closure) -> Tensor:
        return closure()

    def _schedule(self, closure: Closure, loss: Tensor) -> None:
        for scheduler in self.schedulers:
            scheduler.step()


class Automatic(Training):
    """AutoLR as it is meant to be used: its probes repeat the step's loss, noise and all."""

    def __init__(self, optimizers: Sequence[Optimizer], scheduler: AutoLR):
        super().__init__(optimizers, [scheduler])
        self._auto = scheduler

    def _loss(self, closure: Closure) -> Tensor:
        return self._auto.loss(closure)


class Watching(Automatic):
    """AutoLR that is told the loss on examples held back, and ends the training."""

    @property
    def has_ended(self) -> bool:
        """Whether AutoLR has annealed."""
        return self._auto.has_ended

    def watch(self, loss: Tensor) -> None:
        """Let AutoLR see the loss."""
        self._auto.watch(loss)


class AfterStep(Automatic):
    """AutoLR that sees the closure only after the step."""

    def _loss(self, closure: Closure) -> Tensor:
        return closure()

    def _schedule(self, closure: Closure, loss: Tensor) -> None:
        self._auto.step(closure)


class Plateau(Training):
    """ReduceLROnPlateau on the mean training loss of each twentieth of the training."""

    def __init__(self, optimizer: Optimizer, total: int):
        super().__init__([optimizer])
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
        super().__init__([optimizer])
        self._averaging = optimizer
        optimizer.train()

    def tested(self, model: nn.Module) -> nn.Module:
        """Return the network with the averaged parameters."""
        self._averaging.eval()
        return model


class Averaged(Training):
    """DoG, which is tested at its polynomial average."""

    def __init__(self, optimizer: Optimizer, averager: Any):
        super().__init__([optimizer])
        self._averager = averager

    def _schedule(self, closure: Closure, loss: Tensor) -> None:
        self._averager.step()

    def tested(self, model: nn.Module) -> nn.Module:
        """Return the averaged network."""
        return self._averager.averaged_model


class LineSearch(Training):
    """SaLSA, whose step evaluates the closure and calls backward itself."""

    def __init__(self, optimizer: Any):
        super().__init__([optimizer])
        self._search = optimizer

    @property
    def lr(self) -> float:
        """The step size."""
        return float(self._search.step_size)

    def step(self, closure: Closure) -> Tensor:
        """Take a step; the loss is that before it."""
        self._search.zero_grad()

        def evaluate(backwards: bool = False) -> Tensor:
            loss = closure()
            if backwards:
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        try:
            return self._search.step(evaluate).detach()
        except ValueError:  # it found parameters that are not numbers
            return torch.tensor(math.nan)


Build = Callable[[nn.Module, str, float, int], Training]
"""From model, name of the optimizer, lr0 and the number of steps to a training."""


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizers(model: nn.Module, name: str, lr: float) -> list[Optimizer]:
    if name != MUON_AND_ADAMW:
        return [OPTIMIZERS[name](_trained(model), lr=lr)]
    matrices = [parameter for parameter in _trained(model.get_submodule("blocks")) if parameter.ndim == 2]
    taken = set(matrices)
    rest = [parameter for parameter in _trained(model) if parameter not in taken]
    return [
        torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr),
    ]


def _scheduled(make: Callable[[Optimizer, float, int], LRScheduler]) -> Build:
    def build(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
        optimizers = _optimizers(model, optimizer, lr)
        return Training(optimizers, [make(optim, lr, total) for optim in optimizers])

    return build


def _one_cycle(optim: Optimizer, lr: float, total: int) -> OneCycleLR:
    plain = optim.param_groups[0].get("momentum") == 0.0  # it would give SGD a momentum to cycle
    return OneCycleLR(optim, max_lr=lr, total_steps=total + 1, cycle_momentum=not plain)


def _warmed_up(optim: Optimizer, _: float, total: int) -> LambdaLR:
    rise = max(1, total // 20)
    return LambdaLR(optim, lambda step: min((step + 1) / rise, (total - step) / (total - rise)))


def _auto(loop: type[Automatic], kind: Callable[..., AutoLR] = AutoLR, **options: Any) -> Build:
    def build(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
        optimizers = _optimizers(model, optimizer, lr)
        scheduled = optimizers if len(optimizers) > 1 else optimizers[0]
        annealing = {} if kind == AutoLR.paper else {"total_steps": total}
        return loop(optimizers, kind(scheduled, model, **{"evaluator": "inplace", **annealing, **options}))

    return build


def _plateau(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    return Plateau(OPTIMIZERS[optimizer](_trained(model), lr=lr), total)


def _d_adaptation(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from dadaptation import DAdaptAdam, DAdaptSGD  # noqa: PLC0415

    if optimizer == "AdamW":
        optim = DAdaptAdam(_trained(model), lr=lr, weight_decay=0.01, decouple=True)
    else:
        optim = DAdaptSGD(_trained(model), lr=lr, momentum=0.9 if optimizer == "momentum" else 0.0)
    return Training([optim], [BASELINES["cosine"](optim, total)])


def _prodigy(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from prodigyopt import Prodigy  # noqa: PLC0415

    optim = Prodigy(_trained(model), lr=lr, weight_decay=0.01)
    return Training([optim], [BASELINES["cosine"](optim, total)])


def _schedule_free(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from schedulefree import AdamWScheduleFree, SGDScheduleFree  # noqa: PLC0415

    if optimizer == "AdamW":
        return ScheduleFree(AdamWScheduleFree(_trained(model), lr=lr, weight_decay=0.01, warmup_steps=total // 20))
    return ScheduleFree(SGDScheduleFree(_trained(model), lr=lr, warmup_steps=total // 20))


def _dog(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from dog import DoG, PolynomialDecayAverager  # noqa: PLC0415

    return Averaged(DoG(_trained(model), lr=lr), PolynomialDecayAverager(model))


def _salsa(model: nn.Module, optimizer: str, lr: float, total: int) -> Training:
    from salsa.SaLSA import SaLSA  # noqa: PLC0415

    return LineSearch(SaLSA(_trained(model), init_step_size=lr))


METHODS: Mapping[str, Build] = {
    "AutoLR": _auto(Automatic),
    AFTER_STEP: _auto(AfterStep),
    HELD_BACK: _auto(Watching),
    **{method_with(name): _auto(Automatic, kind, **options) for name, (kind, options) in VARIANTS.items()},
    **{name: _scheduled(lambda optim, _, total, make=make: make(optim, total)) for name, make in BASELINES.items()},
    "one cycle": _scheduled(_one_cycle),
    WARMED_UP: _scheduled(_warmed_up),
    "plateau": _plateau,
    "D-Adaptation": _d_adaptation,
    "Prodigy": _prodigy,
    "Schedule-Free": _schedule_free,
    "DoG": _dog,
    "SaLSA": _salsa,
}
