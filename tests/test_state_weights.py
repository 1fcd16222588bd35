"""Optimizers that keep weights in their state: a first step that is taken again moves these too."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR, Rule

from .helpers import assert_same, between, everything, mlp, raise_rate


class Averaging(torch.optim.Optimizer):
    """Schedule-Free SGD: ``z`` makes the steps, the parameters lie between it and the average of all of them."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                x = (p - 0.1 * z) / 0.9
                z.sub_(p.grad, alpha=group["lr"])
                p.copy_(0.9 * (x + (z - x) / group["k"]) + 0.1 * z)


class Master(torch.optim.Optimizer):
    """AdamW whose weights are float32, and the parameters their rounding."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(
                    step=0, master=p.detach().float().clone(), m=torch.zeros(p.shape), v=torch.zeros(p.shape)
                )
            state["step"] += 1
            grad = p.grad.float()
            state["m"].lerp_(grad, 0.1)
            state["v"].lerp_(grad.square(), 0.01)
            m, v = state["m"] / (1 - 0.9 ** state["step"]), state["v"] / (1 - 0.99 ** state["step"])
            state["master"].sub_(self.param_groups[0]["lr"] * m / (v.sqrt() + 1e-8))
            p.copy_(state["master"])


class DualAveraging(torch.optim.Optimizer):
    """As MADGRAD: each step starts from the first weights again, by the sum of all gradients."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        if "k" not in self.state:
            self.state["k"] = torch.zeros(1)
        rate = self.param_groups[0]["lr"] * math.sqrt(self.state["k"].item() + 1)
        self.state["k"] += 1
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(x0=p.detach().clone(), s=torch.zeros_like(p), v=torch.zeros_like(p))
            state["s"].add_(p.grad, alpha=rate)
            state["v"].addcmul_(p.grad, p.grad, value=rate)
            p.lerp_(state["x0"] - state["s"] / (state["v"].pow(1 / 3) + 1e-6), 0.1)


def start(kind, lr0, dtype=torch.float32):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    optimizer = kind(model.parameters(), lr0)
    return model, optimizer, AutoLR(optimizer, model, total_steps=100, evaluator="inplace")


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).argmax(1)
    return F.cross_entropy(model(x.to(model[0].weight.dtype)).float(), y)


def train(model, optimizer, scheduler, steps):
    for step in steps:
        optimizer.zero_grad()
        scheduler.loss(lambda step=step: loss_of(model, step)).backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("kind", "dtype", "name"), [(Averaging, torch.float32, "z"), (Master, torch.bfloat16, "master")]
)
def test_weights_in_the_state_move_along(kind, dtype, name):
    """They lie where they would, had the step been taken at the rate that was found."""
    model, optimizer, scheduler = start(kind, 10.0, dtype)
    before = copy.deepcopy(model)
    train(model, optimizer, scheduler, [0])
    rate = 10.0 * scheduler.last_probe.retaken
    assert rate < 4
    other = kind(before.parameters(), rate)
    loss_of(before, 0).backward()
    other.step()
    for mine, expected in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(
            optimizer.state[mine][name],
            other.state[expected][name],
            rtol=1e-3,
            atol=1e-2 if dtype.itemsize == 2 else 1e-5,
        )


@pytest.mark.parametrize(("kind", "dtype"), [(Averaging, torch.float32), (Master, torch.bfloat16)])
def test_the_training_ends_as_from_a_good_start(kind, dtype):
    ends = []
    for lr0 in (1e-2, 10.0):
        model, optimizer, scheduler = start(kind, lr0, dtype)
        train(model, optimizer, scheduler, range(100))
        ends.append(loss_of(model, 999).item())
    assert max(ends) < 0.45
    assert max(ends) < 1.3 * min(ends) + 0.02


@pytest.mark.usefixtures("every_probe")
def test_steps_that_blow_up_later_move_them_too():
    """From where they were when the window began, which is kept."""
    model, optimizer, _ = start(Averaging, 0.1)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", rule=Rule(window_steps=2))
    train(model, optimizer, scheduler, range(4))
    kept = {p: optimizer.state[p]["z"].clone() for p in model.parameters()}
    train(model, optimizer, scheduler, [4])
    raise_rate(scheduler, 3000)
    optimizer.zero_grad()
    scheduler.loss(lambda: loss_of(model, 5)).backward()
    optimizer.step()
    blown = {p: optimizer.state[p]["z"].clone() for p in model.parameters()}
    scheduler.step()
    ratio = scheduler.last_probe.retaken
    assert 0 <= ratio < 0.5
    for p in model.parameters():
        torch.testing.assert_close(optimizer.state[p]["z"], between(kept[p], blown[p], ratio), rtol=1e-4, atol=1e-5)


def test_a_first_step_that_starts_from_other_weights_is_undone_and_told():
    model, optimizer, scheduler = start(DualAveraging, 10.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"weights in its state \('x0'\).*is undone.*Start from"):
        train(model, optimizer, scheduler, [0])
    assert_same(before, [p.detach() for p in model.parameters()])
    assert scheduler.last_probe.retaken == 0
    assert not optimizer.state
    assert scheduler.level[0] < 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, scheduler, range(1, 100))
    assert loss_of(model, 999) < 0.6


def test_a_later_step_of_it_stays_and_is_told():
    model, optimizer, scheduler = start(DualAveraging, 1e-2)
    train(model, optimizer, scheduler, [])
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    scheduler = AutoLR(optimizer, model, calibration_steps=20, evaluator="inplace")
    optimizer.zero_grad()
    scheduler.loss(lambda: loss_of(model, 3)).backward()
    optimizer.step()
    ended = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"\('x0'\).*stays as it is"):
        scheduler.step()
    assert_same(ended, [p.detach() for p in model.parameters()])
    assert scheduler.last_probe.retaken is None
    assert scheduler.last_probe.factor > 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_that_equals_the_weights_is_none_of_them(momentum):
    """As that of half their squared length, where the first momentum is the weights themselves."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([3.0, -2.0, 1.0]))})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)
    scheduler = AutoLR(optimizer, model, evaluator="inplace")
    scheduler.loss(lambda: model["w"].square().sum() / 2).backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    torch.testing.assert_close(model["w"].detach(), 0.875 * torch.tensor([3.0, -2.0, 1.0]))
    if momentum:
        assert optimizer.state[model["w"]]["momentum_buffer"].tolist() == [3.0, -2.0, 1.0]


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_run_is_resumed_bit_for_bit(cut):
    """In the first steps the state has what the optimizer's weights were before them."""

    def begin():
        model, optimizer, _ = start(Averaging, 10.0)
        return model, optimizer, AutoLR(optimizer, model, evaluator="inplace", rule=Rule(window_steps=(1, 3)))

    def go_on(parts, steps):
        for step in steps:
            if step == 5:
                raise_rate(parts[2], 3000)
            train(*parts, [step])

    whole, first, resumed = begin(), begin(), begin()
    go_on(whole, range(8))
    go_on(first, range(cut))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go_on(resumed, range(cut, 8))
    assert whole[2].history[5].retaken is not None
    assert_same(everything(*whole[:2]), everything(*resumed[:2]))
    assert str(whole[2].state_dict()) == str(resumed[2].state_dict())


def test_an_entry_that_is_the_parameter_itself_is_moved_once():
    """As ``p.float()`` is, of a parameter that has that dtype already."""
    model, optimizer, scheduler = start(Master, 10.0)
    for p in model.parameters():
        optimizer.state[p].update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p), master=p.detach())
    scheduler = AutoLR(optimizer, model, calibration_steps=20, evaluator="inplace")
    before = loss_of(model, 0).item()
    train(model, optimizer, scheduler, [0])
    assert scheduler.last_probe.retaken < 0.1
    assert loss_of(model, 0) < before


@pytest.mark.parametrize("lr0", [1e-2, 10.0])
def test_schedule_free_itself(lr0):
    schedulefree = pytest.importorskip("schedulefree")
    for kind in (schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree):
        torch.manual_seed(0)
        model = mlp()
        optimizer = kind(model.parameters(), lr=lr0)
        optimizer.train()
        scheduler = AutoLR(optimizer, model, total_steps=100, evaluator="inplace")
        train(model, optimizer, scheduler, range(100))
        optimizer.eval()
        assert loss_of(model, 999) < 0.45
