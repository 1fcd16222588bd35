"""A run that is saved and goes on elsewhere is bit for bit the one that was not interrupted."""

import io
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR, Rule

from .helpers import ON_GPU, assert_same, everything

STEPS = 14


class Model(nn.Module):
    """Matrices for Muon, and what is left for AdamW: biases, a scale, a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.body(x)


def start(kind, which, evaluator):
    """Two optimizers or one; probes of 1 to 4, 6, 9 and 12, for the heat alone or over one and three steps too."""
    torch.manual_seed(3)
    model = Model()
    if kind == "two":
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=1e-3)]
    else:
        lr = torch.tensor(0.01) if kind == "tensor" else 0.01
        optimizers = [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)]
    scheduler = AutoLR(
        optimizers,
        model,
        total_steps=STEPS,
        probe_every_steps=3,
        probe_until_fraction=1.0,
        calibration_steps=4,
        rule=None if kind == "tensor" else Rule(window_steps=(1, 3)),
        micro_batches=which,
        evaluator=evaluator,
    )
    return model, optimizers, scheduler


def run(model, optimizers, scheduler, steps, rows):
    """Train with two micro-batches a step, and noise from all streams in the loss."""
    for _ in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(2):
            x, y = torch.randn(8, 5), torch.randint(3, (8,))

            def closure(x=x, y=y):
                scale = 1 + 0.3 * random.random() + 0.3 * float(numpy.random.random())
                return F.cross_entropy(model(x + 0.1 * torch.randn_like(x)) * scale, y)

            (scheduler.loss(closure) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
        rows.append([float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups])


def streams():
    """The states of all random streams, of plain values and tensors."""
    keys = numpy.random.get_state(legacy=False)
    keys["state"] = {**keys["state"], "key": keys["state"]["key"].tolist()}
    states = [random.getstate(), keys, torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if ON_GPU else states


def set_streams(states):
    pythons, numpys, *torchs = states
    random.setstate(pythons)
    numpys["state"]["key"] = numpy.array(numpys["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state(numpys)
    for setter, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), torchs, strict=False):
        setter(state)


def seed():
    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)


def saved(model, optimizers, scheduler):
    """Return what a file gives back that is loaded with ``weights_only``."""
    file = io.BytesIO()
    states = [model.state_dict(), [each.state_dict() for each in optimizers], scheduler.state_dict(), streams()]
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("evaluator", ["auto", "stacked"])
@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("kind", ["one", "tensor", "two"])
def test_a_run_that_was_cut_anywhere_is_the_same(kind, which, evaluator):
    """Cut after each step: in calibration, inside of windows, between probes."""
    arguments = kind, which, evaluator
    whole, rows, states = start(*arguments), [], []
    seed()
    for step in range(STEPS):
        run(*whole, [step], rows)
        states.append(saved(*whole))
    model, optimizers, scheduler = whole
    end = [tensor for optimizer in optimizers for tensor in everything(model, optimizer)]
    left = streams()
    history = [probe.to_dict() for probe in scheduler.history]
    level = str(scheduler.state_dict()["level"])  # with the heats
    assert [probe["step"] for probe in history] == [1, 2, 3, 4, 6, 9, 12]
    windows = [1, 1, 1, 1, 3, 3, 3] if kind == "tensor" else [1, 2, 1, 3, 1, 3, 1]
    assert [probe["window"] for probe in history] == windows
    open_after = [bool(state[2]["snapshots"]["windows"]) for state in states]
    assert open_after == [step < 12 for step in range(1, STEPS + 1)]
    for cut, (weights, of_optimizers, of_scheduler, of_streams) in enumerate(states[:-1], 1):
        model, optimizers, scheduler = start(*arguments)
        model.load_state_dict(weights)
        for optimizer, state in zip(optimizers, of_optimizers, strict=True):
            optimizer.load_state_dict(state)
        scheduler.load_state_dict(of_scheduler)
        set_streams(of_streams)
        assert [float(lr) for lr in scheduler.get_last_lr()] == rows[cut - 1]
        resumed = []
        run(model, optimizers, scheduler, range(cut, STEPS), resumed)
        assert resumed == rows[cut:]
        assert [probe.to_dict() for probe in scheduler.history] == history
        assert str(scheduler.state_dict()["level"]) == level
        assert str(streams()) == str(left)
        assert_same(end, [tensor for optimizer in optimizers for tensor in everything(model, optimizer)])
