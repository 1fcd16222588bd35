"""What state an optimizer may be in when AutoLR is given it, and which optimizers have no use for it."""

import copy
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, SequentialLR

from autolr_fast import AutoLR

from .helpers import mlp, problem, sgd


def train(model, loss_of, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        scheduler.step()


class OwnSizes(torch.optim.Optimizer):
    """Steps of 0.01 a weight, whatever its lr is."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad.sign())


class InnerSizes(OwnSizes):
    """The same, of Rprop's kind: lr is where its step sizes start."""

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            size = self.state[parameter].setdefault("size", torch.tensor(self.param_groups[0]["lr"]))
            if parameter.grad is not None:
                parameter.sub_(size * parameter.grad.sign())


class HeavyBall(OwnSizes):
    """Momentum that has the lr inside: steps follow lr after a while."""

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                buffer = self.state[parameter].setdefault("v", torch.zeros_like(parameter))
                buffer.mul_(0.9).sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
                parameter.add_(buffer)


class Holds(OwnSizes):
    """Holds another optimizer, which a trial of its step would move."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.base = torch.optim.SGD(self.param_groups, lr=lr)

    def step(self):
        self.base.step()


class Strict(OwnSizes):
    """Takes parameters of one shape only."""

    def step(self):
        if self.param_groups[0]["params"][0].shape != (16, 5):
            raise RuntimeError("shape")


@pytest.mark.parametrize("lr", [1e-6, 10.0])
@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.ASGD, OwnSizes, InnerSizes])
def test_an_optimizer_whose_steps_do_not_follow_its_lr_is_refused(kind, lr):
    model = mlp()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"optimizer={kind.__name__}: its steps do not follow the lr.*another one"):
        AutoLR(kind(model.parameters(), lr=lr), model)
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", [HeavyBall, Holds, Strict])
def test_a_trial_that_cannot_be_made_or_is_passed_refuses_none(kind):
    model, loss_of = problem("mlp")
    loss_of(model).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = kind(model.parameters(), lr=0.1)
    AutoLR(optimizer, model)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1


ACCEPTED = {
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "SparseAdam",
    "Muon",
}  # fmt: skip


def test_every_optimizer_of_torch_is_served_or_refused():
    kinds = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert kinds == ACCEPTED | {"LBFGS", "Rprop", "ASGD"}


@pytest.mark.parametrize("name", sorted(ACCEPTED - {"SparseAdam", "Muon"}))
def test_the_rate_found_does_not_depend_on_the_start(name):
    ends = []
    for lr0 in (1e-4, 1e-2, 1.0):
        model, loss_of = problem("mlp")
        model.double()
        x, y = torch.randn(32, 5, dtype=torch.float64), torch.randint(3, (32,))
        torch.manual_seed(0)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=lr0)
        scheduler = AutoLR(optimizer, model, total_steps=60)
        x = torch.randn(32, 5, dtype=torch.float64)
        y = (x @ torch.randn(5, 3, dtype=torch.float64)).argmax(1)
        loss_of = lambda model, x=x, y=y: torch.nn.functional.cross_entropy(model(x), y)  # noqa: E731
        train(model, loss_of, optimizer, scheduler, 1)
        ends.append(scheduler.level[0])
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
    assert ends[2] == pytest.approx(ends[1], rel=0.05)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw", "adagrad"])
def test_a_second_training_goes_on_from_the_level_of_the_first(kind):
    """As a Trainer's train() called twice: a trained model was searched again, and its loss rose by half."""
    model, loss_of = problem("mlp")
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-4),
        "momentum": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-4),
    }[kind](model.parameters())
    first = AutoLR(optimizer, model, total_steps=50)
    train(model, loss_of, optimizer, first, 50)
    level, loss = first.level, loss_of(model).item()
    assert optimizer.param_groups[0]["lr"] < 1e-3 * level[0]
    second = AutoLR(optimizer, model, total_steps=50)
    assert second.level == pytest.approx(level)
    with pytest.warns(UserWarning, match=r"trained before, so AutoLR starts from its lr \(.*calibration_steps=20"):
        train(model, loss_of, optimizer, second, 1)
    assert not second.history
    assert second.get_last_lr()[0] == pytest.approx(level[0], rel=0.01)
    train(model, loss_of, optimizer, second, 49)
    assert loss_of(model).item() < loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = AutoLR(optimizer, model, total_steps=50, calibration_steps=20)
        train(model, loss_of, optimizer, asked, 1)
    assert asked.last_probe.rounds > 3


def test_an_optimizer_that_has_not_stepped_is_searched():
    """Also one that makes its state before, and one of a scheduler that came to nothing."""
    model, loss_of = problem("mlp")
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-3)
    assert optimizer.state
    AutoLR(optimizer, model)
    scheduler = AutoLR(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, loss_of, optimizer, scheduler, 1)
    assert scheduler.last_probe.rounds > 3


@pytest.mark.parametrize("cut", [3, 19, 25])
def test_a_resumed_run_is_calibrated_as_it_was(cut):
    """Though the optimizer was loaded first, and has trained by then."""
    model, loss_of = problem("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = AutoLR(optimizer, model, total_steps=50)
    train(model, loss_of, optimizer, scheduler, cut)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, scheduler)])
    train(model, loss_of, optimizer, scheduler, 30 - cut)
    other, _ = problem("mlp")
    others = torch.optim.AdamW(other.parameters(), lr=1e-3)
    other.load_state_dict(states[0])
    others.load_state_dict(states[1])
    resumed = AutoLR(others, other, total_steps=50)
    resumed.load_state_dict(states[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, loss_of, others, resumed, 30 - cut)
    assert [probe.step for probe in resumed.history] == [probe.step for probe in scheduler.history]
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert str(resumed.state_dict()) == str(scheduler.state_dict())


def test_the_scheduler_that_was_built_last_has_the_optimizer():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    first = AutoLR(optimizer, model)
    second = AutoLR(optimizer, model)
    train(model, loss_of, optimizer, second, 3)
    assert second.last_epoch == 3
    with pytest.raises(
        RuntimeError, match="another AutoLR was given SGD since.*call the methods of that scheduler"
    ):
        first.step()
    assert first.last_epoch == 0


def test_a_warm_up_in_a_sequence_is_told_and_its_end_refused():
    """SequentialLR takes the first rate down before AutoLR sees it, and gives schedulers an epoch."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.1)
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=3)
    scheduler = AutoLR(optimizer, model)
    assert scheduler.level == [0.1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one writes the rate of the other
        both = SequentialLR(optimizer, [warm_up, scheduler], milestones=[3])
        with pytest.raises(TypeError, match="SequentialLR cannot hold an AutoLR.*use it alone"):
            for _ in range(4):
                loss_of(model).backward()
                optimizer.step()
                both.step()


@pytest.mark.parametrize("loads", [False, True])
def test_another_scheduler_before_the_first_step_is_told_unless_a_state_is_loaded(loads):
    """A loaded optimizer has the ``initial_lr`` of its run, and SGD no state that tells of one."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.1)
    LinearLR(optimizer, start_factor=0.1)
    state = AutoLR(sgd(model, lr=0.01), model).state_dict()
    scheduler = AutoLR(optimizer, model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if loads:
            scheduler.load_state_dict(state)
        train(model, loss_of, optimizer, scheduler, 1)
    assert loads != any("is 0.01, and its initial_lr 0.1" in str(each.message) for each in told)


def test_past_its_end_another_scheduler_may_write():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.1)
    scheduler = AutoLR(optimizer, model, total_steps=10)
    train(model, loss_of, optimizer, scheduler, 10)
    optimizer.param_groups[0]["lr"] = 0.05
    loss_of(model).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_step_of_an_epoch_is_told():
    model, _ = problem("mlp")
    with pytest.raises(TypeError, match="closure=3: expected a callable.*step takes no epoch"):
        AutoLR(sgd(model), model).step(3)


def test_a_chain_with_another_scheduler_is_told():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.1)
    both = ChainedScheduler([scheduler := AutoLR(optimizer, model), CosineAnnealingLR(optimizer, 10)])
    with pytest.warns(UserWarning, match="something else writes it"):
        for _ in range(3):
            optimizer.zero_grad()
            scheduler.loss(lambda: loss_of(model)).backward()
            optimizer.step()
            both.step()


def test_a_resumed_longer_schedule_misses_no_probe():
    """Steps of before were not to be probed then; at 70 there is no place eleven steps before to look from."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, total_steps=60)
    train(model, loss_of, optimizer, scheduler, 60)
    longer = AutoLR(optimizer, model, total_steps=200)
    longer.load_state_dict(scheduler.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, loss_of, optimizer, longer, 25)
    assert longer.last_probe.step == 80


class Dispatches(OwnSizes):
    """Keeps a bound method of its own, through which a trial would reach its parameters."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.inner = self.move

    @torch.no_grad()
    def move(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])

    def step(self):
        self.inner()


def test_a_trial_does_not_reach_the_parameters_by_a_method_that_is_kept():
    model, loss_of = problem("mlp")
    loss_of(model).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    AutoLR(Dispatches(model.parameters(), lr=0.1), model)
    assert all(map(torch.equal, before, model.parameters()))


def test_buffers_that_are_made_before_the_first_step_are_no_training():
    model, loss_of = problem("mlp")
    optimizer = HeavyBall(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        optimizer.state[parameter]["v"] = torch.zeros_like(parameter)
    scheduler = AutoLR(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, loss_of, optimizer, scheduler, 1)
    assert scheduler.last_probe.rounds > 3


def test_a_group_that_was_replaced_is_told():
    model, loss_of = problem("mlp")
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    scheduler = AutoLR(optimizer, model)
    train(model, loss_of, optimizer, scheduler, 2)
    params = optimizer.param_groups.pop()["params"]
    optimizer.add_param_group({"params": list(params), "lr": 1e-5})
    with pytest.raises(
        ValueError, match="had 2, and one of those is gone: groups can be added, not removed or replaced"
    ):
        train(model, loss_of, optimizer, scheduler, 1)


def test_what_is_no_optimizer_is_told():
    model, _ = problem("mlp")
    optimizer = sgd(model)
    with pytest.raises(TypeError, match=r"optimizer is a model: give the optimizer first"):
        AutoLR(model, optimizer)
    with pytest.raises(TypeError, match="optimizer is a CosineAnnealingLR, a scheduler: give its optimizer"):
        AutoLR(CosineAnnealingLR(optimizer, 10), model)
