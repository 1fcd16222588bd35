"""Param groups that are added while training runs, and groups of very different rates."""

import contextlib
import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR, Rule

from .helpers import assert_same, everything, losses_of_copies, mlp, parameters_of, problem, sgd


def batch_loss(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 5, generator=generator)
    return F.cross_entropy(model(x), (x @ torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).argmax(1))


def unfreeze(model, optimizer, **options):
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), **options})


def start(lr0, kind=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = kind(model[2].parameters(), lr=lr0)
    return model, optimizer, AutoLR(optimizer, model, total_steps=100, evaluator="inplace", **options)


def train(model, optimizer, scheduler, steps, way="loss"):
    for step in steps:
        optimizer.zero_grad()
        loss_of = lambda step=step: batch_loss(model, step)  # noqa: E731
        loss = scheduler.loss(loss_of) if way == "loss" else loss_of()
        loss.backward()
        optimizer.step()
        scheduler.step(None if way == "loss" else loss_of)


@pytest.mark.parametrize("way", ["loss", "step"])
@pytest.mark.parametrize("added_lr", [1e-5, 0.3, 10.0])
@pytest.mark.parametrize("lr0", [1e-6, 10.0])
def test_a_group_that_is_added_is_searched_whatever_its_rate(lr0, added_lr, way):
    """The same rate is found from any, and its step is taken again there; the others stay as they are."""
    model, optimizer, scheduler = start(lr0)
    train(model, optimizer, scheduler, range(25), way)
    unfreeze(model, optimizer, lr=added_lr)
    before = parameters_of(model)
    train(model, optimizer, scheduler, [25], way)
    probe = scheduler.last_probe
    assert (probe.step, probe.window, len(probe.lr_after)) == (26, 1, 2)
    assert probe.lr_before[1] == added_lr
    rate = probe.factor.item() * added_lr
    assert rate == pytest.approx(0.0329, rel=0.02)
    assert scheduler.get_last_lr()[1] == pytest.approx(rate / 3, rel=0.02)  # and a step of annealing
    # Independently: no shorter step of the new group, the others at rest, has a lower loss; a longer one forgets.
    moved = parameters_of(model)
    lowest = batch_loss(model, 25).item()
    others = losses_of_copies(
        model,
        {name: before[name] for name in ("0.weight", "0.bias")},
        [0.0, 0.3, 0.8],
        lambda model: batch_loss(model, 25),
    )
    assert lowest < min(others)
    assert not torch.equal(moved["2.weight"], before["2.weight"])
    ratio = scheduler.get_last_lr()[1] / scheduler.get_last_lr()[0]
    train(model, optimizer, scheduler, range(26, 45), way)
    assert scheduler.get_last_lr()[1] / scheduler.get_last_lr()[0] == pytest.approx(ratio)
    assert batch_loss(model, 99) < 0.8


@pytest.mark.usefixtures("every_probe")
def test_a_group_that_is_frozen_is_searched_once_it_moves():
    model, optimizer, scheduler = start(1e-3)
    train(model, optimizer, scheduler, range(25))
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 10.0})
    train(model, optimizer, scheduler, range(25, 33))
    assert [probe.step for probe in scheduler.history][-2:] == [20, 30]
    assert scheduler.get_last_lr()[1] == 10.0
    model[0].requires_grad_(True)
    train(model, optimizer, scheduler, [33])
    assert scheduler.last_probe.step == 34
    assert scheduler.get_last_lr()[1] < 0.5


def test_a_group_at_zero_is_not_searched_and_stays_there():
    model, optimizer, scheduler = start(1e-3)
    train(model, optimizer, scheduler, range(25))
    unfreeze(model, optimizer, lr=0.0)
    before = parameters_of(model)["0.weight"]
    train(model, optimizer, scheduler, range(25, 35))
    assert scheduler.last_probe.step == 30
    assert scheduler.get_last_lr()[1] == 0
    assert torch.equal(before, model[0].weight)


@pytest.mark.parametrize("at", [1, 2])
def test_a_group_that_comes_before_the_search_is_part_of_it(at):
    """As of a step that is skipped; its ratio is that of the rates as they are given."""
    model, optimizer, scheduler = start(10.0)
    if at == 2:
        with pytest.warns(UserWarning, match="could not calibrate"):
            optimizer.zero_grad()
            (batch_loss(model, 0) * 0).backward()
            optimizer.step()
            scheduler.step(lambda: batch_loss(model, 0) * math.nan)
    unfreeze(model, optimizer, lr=1.0)
    train(model, optimizer, scheduler, range(5))
    assert scheduler.get_last_lr()[0] / scheduler.get_last_lr()[1] == pytest.approx(10)
    assert scheduler.get_last_lr()[0] < 1


def test_a_group_that_cannot_be_searched_is_as_if_it_had_been_there_from_the_start():
    model, optimizer, scheduler = start(10.0)
    train(model, optimizer, scheduler, range(25))
    unfreeze(model, optimizer, lr=1.0)
    optimizer.zero_grad()
    loss = scheduler.loss(lambda: batch_loss(model, 25))
    (-loss).backward()  # uphill: the new group's Adam has no memory that could know better
    optimizer.step()
    before = batch_loss(model, 25)
    with pytest.warns(UserWarning, match="param groups that were added.*no scale of the step.*is undone"):
        scheduler.step()
    assert batch_loss(model, 25) <= before
    assert scheduler.get_last_lr()[0] / scheduler.get_last_lr()[1] == pytest.approx(10)


@pytest.mark.parametrize("added", [23, 24])
@pytest.mark.parametrize("cut", [24, 25, 29])
def test_a_run_with_a_new_group_is_resumed_bit_for_bit(cut, added):
    """Also where it was added, and was not searched yet, when the state was saved."""

    def train_with(parts, steps):
        for step in steps:
            train(*parts, [step])
            if step == added:
                unfreeze(*parts[:2], lr=3.0)

    whole, first, resumed = (start(1e-4, rule=Rule(window_steps=(1, 3))) for _ in range(3))
    train_with(whole, range(40))
    train_with(first, range(cut))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    if cut > added:
        unfreeze(*resumed[:2], lr=3.0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train_with(resumed, range(cut, 40))
    assert added + 2 in [probe.step for probe in whole[2].history]
    assert_same(everything(*whole[:2]), everything(*resumed[:2]))
    assert str(whole[2].state_dict()) == str(resumed[2].state_dict())


@pytest.mark.parametrize("tiny", [0.0, 1e-12])
def test_a_group_that_hardly_moves_holds_no_other(tiny):
    """It pinned the level of all, as the limits bound the most extreme group."""
    model, loss_of = problem("mlp")
    groups = [{"params": model[2].parameters(), "lr": 10.0}, {"params": model[0].parameters(), "lr": tiny}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = AutoLR(optimizer, model, total_steps=60)
    first = loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.level[0] < 2
    assert scheduler.level[1] == tiny
    assert loss_of(model) < 0.7 * first


def test_a_lower_limit_holds_the_lowest_group_alone():
    model, loss_of = problem("mlp")
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "lr": 1.0}]
    )
    scheduler = AutoLR(optimizer, model, total_steps=60, lr_limits=(1e-3, 1e4))
    for _ in range(20):
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == 1e-3
    assert 1e-3 < scheduler.get_last_lr()[1] < 1


def test_rates_of_numpy_and_copies_of_groups():
    numpy = pytest.importorskip("numpy")
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=numpy.float32(0.1))
    scheduler = AutoLR(optimizer, model, total_steps=10)
    optimizer.zero_grad()
    scheduler.loss(lambda: loss_of(model)).backward()
    optimizer.step()
    scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert copy.deepcopy(optimizer.state_dict())["param_groups"][0]["initial_lr"] == scheduler.level[0]


def test_modules_keep_their_own_rates_when_none_is_added():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    scheduler = AutoLR(optimizer, model, total_steps=10, calibration_steps=0)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    train(model, optimizer, scheduler, range(3))
    assert scheduler.get_last_lr()[0] / scheduler.get_last_lr()[1] == pytest.approx(10)


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("frozen_at", [0, 10])
def test_layers_that_were_frozen_are_watched_for_as_many_steps_as_calibration_takes(frozen_at):
    """Also if they were frozen after AutoLR was made."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, momentum=0.9)
    scheduler = AutoLR(optimizer, model, total_steps=100, evaluator="inplace")
    for step in range(70):
        if step in (frozen_at, 43):
            model[0].requires_grad_(step == 43)
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        is_told = pytest.warns(match="were frozen move now.*add_param_group")
        with is_told if step == 43 else contextlib.nullcontext():
            optimizer.step()
        scheduler.step()
    assert [probe.step for probe in scheduler.history] == [*range(1, 21), 30, 40, *range(44, 64)]


def test_an_added_rate_outside_the_limits_means_nothing():
    model, optimizer, scheduler = start(1e-3, lr_limits=(1e-6, 1.0))
    train(model, optimizer, scheduler, range(25))
    unfreeze(model, optimizer, lr=100.0)
    train(model, optimizer, scheduler, [25])
    assert 1e-3 < scheduler.get_last_lr()[1] < 0.1
