import math

import pytest
import torch

from autolr_fast._level import Level
from autolr_fast._level.annealing import ANNEALINGS, resolve_annealing
from autolr_fast._optimizers import Optimizers

from .helpers import mlp


def optimizer_of(*lrs):
    model = mlp()
    layers = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(layers, lrs, strict=False)]
    return torch.optim.SGD(groups)


def level_of(*lrs, total_steps=None, lr_limits=(1e-12, 1e4)):
    optimizer = optimizer_of(*lrs)
    return optimizer, Level(Optimizers(optimizer), "cosine", total_steps, lr_limits, max_heat=math.inf)


def test_cosine_equals_torch():
    optimizer, level = level_of(0.3, total_steps=40)
    other = optimizer_of(0.3)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=40)
    for step in range(40):
        level.apply(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], rel=1e-9)
        other.step()
        torchs.step()
    level.apply(40)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-12)
    level.apply(1000)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-12)


def test_linear_by_hand():
    assert [ANNEALINGS["linear"](fraction) for fraction in (0, 0.25, 1)] == [1, 0.75, 0]


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda lr: torch.tensor(lr, dtype=torch.float64)])
def test_limits_hold_each_group_alone_and_groups_get_their_ratio_back(kind):
    _, level = level_of(kind(0.1), kind(0.001), lr_limits=(1e-4, 1.0))
    for value, expected in [
        (2.0, (0.2, 0.002)),
        (100.0, (1.0, 0.1)),
        (1e9, (1.0, 1.0)),
        (0.01, (1e-3, 1e-4)),
        (1e-9, (1e-4, 1e-4)),
        (0.5, (0.05, 5e-4)),
    ]:
        level.start_at(value)
        level.apply(0)
        assert [float(lr) for lr in level.rates()] == pytest.approx(expected, rel=1e-6)


def test_tensor_lr_is_filled_never_replaced():
    lr = torch.tensor(0.1)
    optimizer, level = level_of(lr)
    held = optimizer.param_groups[0]["lr"]
    level.start_at(3.0)
    level.apply(0)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.3)
    assert held.dtype == torch.float32
    copy = level.rates()[0]
    copy.fill_(7)
    assert held.item() == pytest.approx(0.3)


def test_a_group_at_zero_stays_there_and_limits_no_other():
    optimizer, level = level_of(0.1, 0.0, torch.tensor(0.0), lr_limits=(1e-4, 1.0))
    for value in (1e-9, 5.0, 1e9):
        level.start_at(value)
        level.apply(0)
        assert float(level.rates()[0]) == pytest.approx(min(max(0.1 * value, 1e-4), 1.0))
        assert [float(rate) for rate in level.rates()[1:]] == [0.0, 0.0]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 0.0, 0.0]


def test_new_group_keeps_what_its_user_wrote():
    optimizer, level = level_of(0.1, total_steps=100)
    level.start_at(4.0)
    level.apply(50)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.02})
    assert level.has_new_groups()
    level.add_groups(scale=1.0)
    assert not level.has_new_groups()
    level.apply(50)
    assert level.rates() == pytest.approx([0.2, 0.02])
    level.apply(75)
    assert level.rates()[0] / level.rates()[1] == pytest.approx(10)
    optimizer.param_groups.pop()
    with pytest.raises(ValueError, match="1 param groups and had 2"):
        level.has_new_groups()


def test_a_new_group_in_proportion_is_as_if_it_had_been_there_from_the_start():
    optimizer, level = level_of(10.0, total_steps=100)
    level.start_at(1e-3)
    level.apply(50)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0})
    level.add_groups()
    level.apply(50)
    assert level.rates() == pytest.approx([0.005, 0.0005])


@pytest.mark.parametrize(
    ("lrs", "limits", "says"),
    [
        ((0.0, 0.0), {}, "lr of all param groups is 0.*give at least one"),
        ((0.1, math.inf), {}, r"lr=inf of optimizer.param_groups\[1\] is no finite number"),
        ((-0.1,), {}, r"lr=-0.1 of optimizer.param_groups\[0\] is no finite number of 0 or more"),
        (
            (0.1,),
            {"lr_limits": (1e-12, 0.01)},
            r"lr=0.1 of optimizer.param_groups\[0\] is outside lr_limits=\(1e-12, 0.01\)",
        ),
        ((0.1, 1e-3), {"lr_limits": (1e-3, 0.05)}, r"lr=0.1 of optimizer.param_groups\[0\] is outside"),
        ((torch.ones(2),), {}, r"shape \[2\]"),
        ((torch.tensor(0.1, requires_grad=True),), {}, "requires_grad=True.*written in place"),
        ((torch.tensor(0.1, dtype=torch.float16),), {}, "torch.float16 tensor"),
    ],
)
def test_bad_rates(lrs, limits, says):
    with pytest.raises(ValueError, match=says):
        level_of(*lrs, **limits)


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


def test_following_scales_the_log_factor_by_the_annealing():
    _, level = level_of(0.1, total_steps=100)
    moved = level.follow(torch.tensor(2.0, dtype=torch.float64), step=50)
    assert level.value.item() == moved.item() == pytest.approx(math.sqrt(2))
    moved = level.follow(torch.tensor(4.0, dtype=torch.float64), step=100)
    assert level.value.item() == pytest.approx(math.sqrt(2))
    assert moved.item() == 1.0


def test_a_state_goes_on_with_the_same_rates():
    optimizer, level = level_of(0.1, 0.01, total_steps=100)
    level.follow(torch.tensor(2.0, dtype=torch.float64), step=10)
    level.apply(10)
    other, resumed = level_of(0.5, 0.5, total_steps=100)
    resumed.check(level.state())
    resumed.load(level.state())
    resumed.apply(10)
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="of 2 param groups and the optimizer has 1"):
        level_of(0.5)[1].check(level.state())
