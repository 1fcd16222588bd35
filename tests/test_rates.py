import math

import pytest
import torch

from autolr_fast.annealing import ANNEALINGS, resolve_annealing
from autolr_fast.rates import Rates

from .helpers import mlp


def optimizer_of(*lrs):
    model = mlp()
    layers = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(layers, lrs, strict=False)]
    return torch.optim.SGD(groups)


def rates_of(*lrs, total_steps=None, min_lr=1e-12, max_lr=1e4):
    optimizer = optimizer_of(*lrs)
    return optimizer, Rates(optimizer, ANNEALINGS["cosine"], total_steps, min_lr, max_lr)


def test_cosine_equals_torch():
    optimizer, rates = rates_of(0.3, total_steps=40)
    other = optimizer_of(0.3)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=40)
    for step in range(40):
        rates.apply(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], rel=1e-9)
        other.step()
        torchs.step()
    rates.apply(40)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-12)
    rates.apply(1000)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-12)


def test_linear_by_hand():
    assert [ANNEALINGS["linear"](fraction) for fraction in (0, 0.25, 1)] == [1, 0.75, 0]


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda lr: torch.tensor(lr, dtype=torch.float64)])
def test_groups_keep_their_ratio_at_the_limits(kind):
    _, rates = rates_of(kind(0.1), kind(0.001), min_lr=1e-4, max_lr=1.0)
    for level, expected in [(2.0, (0.2, 0.002)), (1e9, (1.0, 0.01)), (1e-9, (0.01, 1e-4)), (0.5, (0.05, 5e-4))]:
        rates.set_level(level)
        rates.apply(0)
        assert [float(lr) for lr in rates.current()] == pytest.approx(expected, rel=1e-6)


def test_tensor_lr_is_filled_never_replaced():
    lr = torch.tensor(0.1)
    optimizer, rates = rates_of(lr)
    held = optimizer.param_groups[0]["lr"]
    rates.set_level(3.0)
    rates.apply(0)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.3)
    assert held.dtype == torch.float32
    copy = rates.current()[0]
    copy.fill_(7)
    assert held.item() == pytest.approx(0.3)


def test_new_group_keeps_what_its_user_wrote():
    optimizer, rates = rates_of(0.1, total_steps=100)
    rates.set_level(4.0)
    rates.apply(50)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.02})
    rates.adopt_new_groups(50)
    rates.apply(50)
    assert rates.current() == pytest.approx([0.2, 0.02])
    rates.apply(75)
    assert rates.current()[0] / rates.current()[1] == pytest.approx(10)
    optimizer.param_groups.pop()
    with pytest.raises(ValueError, match="1 param groups and had 2"):
        rates.adopt_new_groups(75)


@pytest.mark.parametrize(
    ("lrs", "limits", "says"),
    [
        ((0.0,), {}, "lr=0.0 of param group 0 is not positive.*requires_grad_"),
        ((0.1, math.inf), {}, "lr=inf of param group 1 is not positive and finite"),
        ((0.1,), {"max_lr": 0.01}, "lr=0.1 of param group 0 is outside min_lr=1e-12 .. max_lr=0.01"),
        ((0.1, 1e-3), {"min_lr": 1e-3, "max_lr": 0.05}, "lr=0.1 of param group 0 is outside"),
        ((torch.ones(2),), {}, r"shape \[2\]"),
        ((torch.tensor(0.1, requires_grad=True),), {}, "requires_grad=True.*written in place"),
        ((torch.tensor(0.1, dtype=torch.float16),), {}, "torch.float16 tensor"),
    ],
)
def test_bad_rates(lrs, limits, says):
    with pytest.raises(ValueError, match=says):
        rates_of(*lrs, **limits)


@pytest.mark.parametrize(
    ("anneal", "error", "says"),
    [
        ("cos", ValueError, "anneal='cos' is not known: use one of 'cosine', 'linear'"),
        (3, TypeError, "anneal=3"),
        (lambda fraction: -fraction, ValueError, "returned -0.5 at 0.5"),
        (lambda fraction: math.nan, ValueError, "returned nan at 0.0"),
        (lambda fraction: None, ValueError, "returned None"),
    ],
)
def test_bad_annealing(anneal, error, says):
    with pytest.raises(error, match=says):
        resolve_annealing(anneal)
