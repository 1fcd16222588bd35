"""A compiled ``optimizer.step`` is compiled no more often under AutoLR than under a schedule of torch's own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import CosineAnnealingLR

from autolr_fast import AutoLR

from .helpers import mlp

STEPS = 30

pytestmark = pytest.mark.cpu


def compiled(optimizer, backend):
    return torch.compile(optimizer.step, backend=backend)


def in_a_function(optimizer, backend):
    return torch.compile(lambda: optimizer.step(), backend=backend)


def in_its_place(optimizer, backend):
    optimizer.step = torch.compile(optimizer.step, backend=backend)
    return lambda: optimizer.step()


def uncompiled(optimizer, backend):
    return optimizer.step


def autolr(optimizer, model):
    return AutoLR(optimizer, model, total_steps=STEPS)


def cosine(optimizer, model):
    return CosineAnnealingLR(optimizer, STEPS)


def train(make_scheduler, make_step, lr, is_first=True):
    """Return rates and losses, and how often a graph was compiled and tracing broke off."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(32, 5), torch.randint(3, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    backend, rows = CompileCounter(), []
    scheduler = make_scheduler(optimizer, model) if is_first else None
    step = make_step(optimizer, backend)
    scheduler = scheduler or make_scheduler(optimizer, model)
    loss_of = getattr(scheduler, "loss", lambda closure: closure())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(lambda: F.cross_entropy(model(x), y))
        loss.backward()
        step()
        with warnings.catch_warnings():  # torch wraps optimizer.step, and a step compiled before is not that one
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            scheduler.step()
        rows.append((float(scheduler.get_last_lr()[0]), loss.item()))
    if make_scheduler is autolr:
        assert [probe.step for probe in scheduler.history] == [*range(1, 21)]
    return rows, backend.frame_count, sum(counters["graph_break"].values())


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize(
    ("is_tensor", "make_step", "is_first"),
    [
        (False, compiled, True),
        (False, in_a_function, False),
        (True, compiled, False),
        (True, in_a_function, True),
        (True, in_its_place, True),
        (True, in_its_place, False),
    ],
)
def test_no_more_graphs_and_breaks_than_with_cosine(is_tensor, make_step, is_first):
    def lr():
        return torch.tensor(1e-3) if is_tensor else 1e-3

    if make_step is in_its_place and not is_first:
        with pytest.raises(ValueError, match="step was replaced by a function.* Build AutoLR before that"):
            train(autolr, make_step, lr(), is_first)
        return
    _, usual_graphs, usual_breaks = train(cosine, make_step, lr(), is_first)
    rows, graphs, breaks = train(autolr, make_step, lr(), is_first)
    assert usual_graphs == (1 if is_tensor else 2)  # a number is a constant until it first changes
    assert graphs == usual_graphs
    assert breaks <= usual_breaks
    assert len({rate for rate, _ in rows}) > 10
    for row, plain in zip(rows, train(autolr, uncompiled, lr())[0], strict=True):
        assert row == pytest.approx(plain, rel=1e-3)  # compiled, Adam's own scalars are tensors
