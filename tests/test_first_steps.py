"""First steps drawn at random: the loss of their batch is no higher than before, and the rate that of any start."""

import copy
import math
import random
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import FACTORS_2, FACTORS_3, FACTORS_7, AutoLR, Rule

from .helpers import random_states, set_random_states

BLOCKS, CASES = 20, 51
BATCH = 8


class Stray(torch.optim.Optimizer):
    """Goes along a direction of its own, or uphill."""

    def __init__(self, parameters, lr, uphill=False):
        super().__init__(parameters, {"lr": lr, "uphill": uphill})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    along = (
                        parameter.grad if group["uphill"] else torch.cos(torch.arange(1.0, 1 + parameter.numel()))
                    )
                    parameter.add_(along.view_as(parameter), alpha=group["lr"])


def moving(optimizer):
    """Each parameter that has a gradient, with its group and its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter, group, optimizer.state[parameter]


class KeepsWeights(torch.optim.Optimizer):
    """Steps a copy of the weights, and trains at a point between that and their average, as Schedule-Free does."""

    def __init__(self, parameters, lr, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self):
        for parameter, group, state in moving(self):
            if not state:
                state["z"], state["average"], state["k"] = parameter.clone(), parameter.clone(), 0
            state["k"] += 1
            state["z"].sub_(parameter.grad, alpha=group["lr"])
            state["average"].lerp_(state["z"], 1 / state["k"])
            parameter.copy_(state["z"].lerp(state["average"], group["beta"]))


class MasterCopy(torch.optim.Optimizer):
    """Steps a copy of the weights in double precision; one that shares their memory may be those themselves."""

    def __init__(self, parameters, lr, shares=False):
        super().__init__(parameters, {"lr": lr, "shares": shares})

    @torch.no_grad()
    def step(self):
        for parameter, group, state in moving(self):
            if not state:
                state["master"] = parameter.to(torch.float64, copy=not group["shares"])
            state["master"].sub_(parameter.grad, alpha=group["lr"])
            parameter.copy_(state["master"])


OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True),
    "decay": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.5),
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr, momentum=0.5),
    "adafactor": lambda parameters, lr: torch.optim.Adafactor(parameters, lr=lr),
    "muon": lambda parameters, lr: torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=lr),
    "stray": Stray,
    "uphill": lambda parameters, lr: Stray(parameters, lr, uphill=True),
    "keeps weights": KeepsWeights,
    "master copy": MasterCopy,
    "shared master copy": lambda parameters, lr: MasterCopy(parameters, lr, shares=True),
}

# Of an output [BATCH, 3], a target like it, and classes.
SMOOTH = {  # and bounded below, with a minimum along each step that is not far
    "mse": lambda out, target, y: F.mse_loss(out, target),
    "huber": lambda out, target, y: F.huber_loss(out, target, delta=0.3),
    "weights": lambda out, target, y: out,
    "cross-entropy": lambda out, target, y: F.cross_entropy(out, y) + 0.01 * out.square().mean(),
}
LOSSES = {
    **SMOOTH,
    "hinge": lambda out, target, y: F.multi_margin_loss(out, y),
    "bounded": lambda out, target, y: (1 - torch.exp(-(out - target).square())).mean(),
    "sigmoid": lambda out, target, y: torch.sigmoid(out * target).mean(),
    "tanh": lambda out, target, y: 3 + torch.tanh(out.sum(1)).mean(),
    "linear": lambda out, target, y: out.mean(),
    "quartic": lambda out, target, y: (out - target).pow(4).mean(),
    "policy gradient": lambda out, target, y: (F.log_softmax(out, 1) * target).sum(1).mean(),
    "large": lambda out, target, y: 1e6 + F.mse_loss(out, target),
    "tiny": lambda out, target, y: 1e-12 * F.mse_loss(out, target),
    "negative": lambda out, target, y: F.mse_loss(out, target) - 100,
    "nan far out": lambda out, target, y: F.mse_loss(out, target) + 0 * torch.sqrt(25 - out.square()).mean(),
    "inf far out": lambda out, target, y: torch.where(out.abs().max() > 5, math.inf, F.mse_loss(out, target)),
    "minus inf far out": lambda out, target, y: torch.where(
        out.abs().max() > 20, -math.inf, F.mse_loss(out, target)
    ),
    "wall": lambda out, target, y: F.mse_loss(out, target) + 1e6 * F.relu(out.abs().max() - 2),
    "log barrier": lambda out, target, y: F.mse_loss(out, target) - torch.log(4 - out.abs()).mean(),
    "flat at first": lambda out, target, y: F.relu((out - target).abs() - 1e-3).mean(),
    "flat": lambda out, target, y: F.relu(out - 1e3).mean(),
    "steps": lambda out, target, y: (out - target).abs().mean() + (3 * out).round().abs().mean(),
    "ripples": lambda out, target, y: F.mse_loss(out, target) + 0.3 * torch.sin(20 * out).mean(),
}


class Net(nn.Module):
    """Random layers."""

    def __init__(self, draw):
        super().__init__()
        width = draw.choice([1, 4, 16])
        layers = [nn.Linear(4, width)]
        for _ in range(draw.choice([0, 0, 1, 2])):
            layers += [draw.choice([nn.Tanh, nn.ReLU, nn.GELU, nn.Identity])(), nn.Linear(width, width)]
            layers += [nn.BatchNorm1d(width)] * draw.choice([0, 0, 0, 1])
        layers += [nn.Dropout(draw.choice([0.0, 0.0, 0.4])), nn.Linear(width, 3)]
        self.layers = nn.Sequential(*layers)
        scale = draw.choice([0.1, 1.0, 1.0, 1.0, 3.0])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(scale)
        if draw.random() < 0.1:
            nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x):
        return self.layers(x)


class Case:
    """A first step, drawn by its number."""

    def __init__(self, number, smooth=False):
        self.number, draw = number, random.Random(number)
        torch.manual_seed(number)
        self.model = Net(draw)
        self.loss = draw.choice(sorted(SMOOTH if smooth else LOSSES))
        names = sorted(set(OPTIMIZERS) - ({"stray", "uphill"} if smooth else set()))
        self.optimizer = draw.choice(names)
        # torch's Adafactor steps as if higher ones were 1.
        self.lr = 10 ** draw.uniform(-6, 0 if self.optimizer == "adafactor" else 1)
        self.precision = "float64" if smooth else draw.choice(["float32", "float32", "float64", "bfloat16"])
        self.factors = draw.choice([FACTORS_2, FACTORS_3, FACTORS_7, FACTORS_7])
        self.noise = 0.0 if smooth else draw.choice([0.0, 0.3])
        if self.precision == "float64":
            self.model.double()
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        self.x = draw.choice([0.1, 1.0, 1.0, 10.0]) * torch.randn(BATCH, 4, dtype=dtype)
        self.target, self.y = torch.randn(BATCH, 3, dtype=dtype), torch.randint(3, (BATCH,))

    def __repr__(self):
        return (
            f"case {self.number}: {self.loss} by {self.optimizer}, lr={self.lr:.3g}, {self.precision}, "
            f"noise={self.noise}, {self.model}"
        )

    def loss_of(self, model):
        on = self.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if on else nullcontext():
            out = model(self.x + self.noise * torch.randn_like(self.x)).to(self.x.dtype)
        if self.loss == "weights":  # whose gradient is the weights
            return sum(parameter.square().sum() for parameter in model.parameters()) / 2
        return LOSSES[self.loss](out, self.target, self.y)

    def take(self):
        """Take the step, and return the scheduler, with the model before it, and where the random streams were."""
        parameters = list(self.model.parameters())
        optimizer = OPTIMIZERS[self.optimizer](parameters, self.lr)
        scheduler = AutoLR(optimizer, self.model, rule=Rule(self.factors), evaluator="inplace")
        before, streams = copy.deepcopy(self.model), random_states()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.loss(lambda: self.loss_of(self.model)).backward()
            optimizer.step()
            scheduler.step()
        return scheduler, before, streams


def loss_from(streams, case, model):
    """Return the loss of a model, with the noise of the step."""
    set_random_states(streams)
    with torch.no_grad():
        return case.loss_of(model).double().item()


@pytest.mark.cpu
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_first_step_leaves_a_higher_loss(block):
    for number in range(block * CASES, (block + 1) * CASES):
        case = Case(number)
        scheduler, before, streams = case.take()
        was, is_now = loss_from(streams, case, before), loss_from(streams, case, case.model)
        eps = torch.finfo(case.x.dtype).eps
        if math.isfinite(was):
            assert is_now <= was + 4 * eps * abs(was), f"{was} before and {is_now} after, {case}"
        rate = scheduler.get_last_lr()[0]
        assert 0 < rate < math.inf, case
        check_kept(case, scheduler, before)


def check_kept(case, scheduler, before):
    """Check that weights in the optimizer's state are where a step of that length would have put them."""
    name = {"keeps weights": "z"}.get(case.optimizer, "master")
    times = max(1.0, scheduler.last_probe.retaken or 1.0)  # as much as the parameters' rounding was scaled by
    for live, begin in zip(case.model.parameters(), before.parameters(), strict=True):
        kept = scheduler.optimizer.state.get(live, {}).get(name)
        if kept is not None:
            atol = 8 * times * torch.finfo(live.dtype).eps * begin.detach().abs().max().item()
            assert torch.allclose(kept.to(live.dtype), live, atol=atol, equal_nan=True), case
        elif live.grad is None:
            assert torch.equal(live, begin), case


@pytest.mark.cpu
@pytest.mark.parametrize("block", range(5))
def test_the_rate_found_does_not_depend_on_the_start(block):
    for number in range(block * 10, (block + 1) * 10):
        found = []
        for times in (1.0, 3.7e-3):
            case = Case(number, smooth=True)
            case.lr *= times
            scheduler, before, streams = case.take()
            was, is_now = loss_from(streams, case, before), loss_from(streams, case, case.model)
            assert is_now < was, case
            found.append(case.lr * float(scheduler.last_probe.factor))
        assert found[1] == pytest.approx(found[0], rel=0.05), case
