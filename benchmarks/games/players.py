"""How each optimizer of a task is stepped: at its usual rate, by a schedule, or by AutoLR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from autolr_fast import AutoLR

__all__ = ["AUTO", "COSINE", "METHODS", "UNCALIBRATED", "Method", "Player", "Setting", "perceptron"]

Method = Callable[[Optimizer, nn.Module, int], LRScheduler]
"""Makes the scheduler of an optimizer, given the model and the optimizer steps of the whole training."""
COSINE, AUTO, UNCALIBRATED = "cosine", "AutoLR", "AutoLR, calibration_steps=0"
METHODS: Mapping[str, Method] = {
    "constant": lambda optimizer, _, steps: ConstantLR(optimizer, factor=1.0, total_iters=steps),
    COSINE: lambda optimizer, _, steps: CosineAnnealingLR(optimizer, steps),
    AUTO: lambda optimizer, model, steps: AutoLR(optimizer, model, total_steps=steps),
    UNCALIBRATED: lambda optimizer, model, steps: AutoLR(optimizer, model, total_steps=steps, calibration_steps=0),
}


class Setting(NamedTuple):
    """What a run of a task is given.

    Attributes:
        method: makes each optimizer's scheduler.
        lr: where each optimizer starts.
        steps: of the training, as the task counts them: rounds, batches of episodes, or optimizer steps.
        seed: of all random numbers.
    """

    method: Method
    lr: float
    steps: int
    seed: int


class Player:
    """One optimizer and its scheduler, stepped as in the README.

    Args:
        name: in the tables.
        optimizer: trains some of the model's parameters.
        model: all that the closures of the optimizer run.
        method: makes the scheduler.
        steps: optimizer steps of the whole training.

    Attributes:
        levels: the rate before annealing, in units of the start, after each step; empty without AutoLR.
    """

    def __init__(self, name: str, optimizer: Optimizer, model: nn.Module, method: Method, steps: int):
        self.name = name
        self.optimizer = optimizer
        self.start: float = optimizer.param_groups[0]["lr"]
        self.scheduler = method(optimizer, model, steps)
        self.levels: list[float] = []

    def move(self, closure: Callable[[], Tensor]) -> None:
        """Make one optimizer step by the loss that the closure returns."""
        auto = self.scheduler if isinstance(self.scheduler, AutoLR) else None
        self.optimizer.zero_grad()
        loss = auto.loss(closure) if auto else closure()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        if auto:
            self.levels.append(auto.level[0] / self.start)

    @property
    def retaken(self) -> int:
        """How many probes took steps again."""
        if not isinstance(self.scheduler, AutoLR):
            return 0
        return sum(probe.retaken is not None for probe in self.scheduler.history)


def perceptron(inputs: int, width: int, outputs: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Return two hidden layers, [B, inputs] -> [B, outputs]."""
    return nn.Sequential(
        nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)
    )
