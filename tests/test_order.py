"""Who calls what, and in which order: what would judge the wrong step, or take another rate, is told."""

import gc
import math
import warnings

import pytest
import torch

from autolr_fast import FACTORS_3, AutoLR, ClosureError, Rule

from .helpers import assert_same, everything, losses_of_copies, mlp, parameters_of, problem, sgd, train_step

EACH_STEP = {"calibration_steps": 0, "probe_every_steps": 1, "rule": Rule(FACTORS_3, window_steps=1)}


@pytest.fixture
def told():
    """What is told, in place of errors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def start(name="mlp", optimizer_of=sgd, **options):
    model, loss_of = problem(name)
    optimizer = optimizer_of(model)
    return model, loss_of, optimizer, AutoLR(optimizer, model, evaluator="inplace", **options)


# The scheduler before the optimizer


def test_a_scheduler_that_steps_before_its_optimizer_is_told_once(told):
    """As torch tells it, at the line of the loop."""
    model, loss_of, optimizer, scheduler = start()
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        scheduler.step(lambda: loss_of(model))
        optimizer.step()
    assert len(told) == 1
    assert "scheduler.step() before optimizer.step()" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_that_order_is_told_at_the_first_step_that_uses_the_gradients_which_were_there(
    micro_batches, set_to_none, told
):
    model, loss_of, optimizer, scheduler = start()
    for iteration in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        for _ in range(micro_batches):
            loss_of(model).backward()
        scheduler.step(lambda: loss_of(model))
        gc.collect()
        assert len(told) == min(iteration, 1)
        optimizer.step()
        assert len(told) == 1


def test_in_that_order_the_losses_are_of_other_steps_and_none_is_judged(told):
    model, loss_of, optimizer, scheduler = start(calibration_steps=3)
    with pytest.raises(ClosureError, match=r"before optimizer.step\(\), and call scheduler.step\(\) after it"):
        for _ in range(6):
            optimizer.zero_grad()
            scheduler.loss(lambda: loss_of(model)).backward()
            scheduler.step()
            optimizer.step()
    assert scheduler.last_epoch == 3
    assert scheduler.last_probe is None
    assert "scheduler.step() before optimizer.step()" in str(told[0].message)


def no_gradients_yet(model, optimizer, scheduler, loss_of):
    scheduler.step()


def gradients_from_before(model, optimizer, scheduler, loss_of):
    """Nothing: the scheduler was made when there were some."""


def a_scaler_skips_the_first(model, optimizer, scheduler, loss_of):
    for _ in range(3):
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        model[0].weight.grad[0, 0] = math.inf
        scheduler.step()


def weights_are_loaded(model, optimizer, scheduler, loss_of):
    model.load_state_dict(mlp().state_dict())
    scheduler.step()


@pytest.mark.parametrize(
    "before", [no_gradients_yet, gradients_from_before, a_scaler_skips_the_first, weights_are_loaded]
)
def test_what_is_no_wrong_order_is_not_told(before):
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    if before is gradients_from_before:
        train_step(model, optimizer, loss_of)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", **EACH_STEP)
    before(model, optimizer, scheduler, loss_of)
    for _ in range(2):
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.last_probe.step == 2


def test_calls_while_gradients_are_accumulated_are_not_told(told):
    """As frameworks make them, blindly: the step that follows is of other gradients, and judged by the rest."""
    model, loss_of, optimizer, scheduler = start(**EACH_STEP)
    for micro in range(1, 9):
        scheduler.loss(lambda: loss_of(model)).backward()
        prev = parameters_of(model)
        if micro % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    assert not told
    assert scheduler.last_probe.step == 2
    expected = losses_of_copies(model, prev, FACTORS_3, loss_of)
    assert scheduler.last_probe.losses.tolist() == expected


# Steps that are not seen


class SAM(torch.optim.Optimizer):
    """As usual: it shares its groups with the optimizer that it wraps, and its own step is never called."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer, self.param_groups = base, base.param_groups

    def second_step(self):
        self.base_optimizer.step()


@pytest.mark.parametrize("through_loss", [False, True])
def test_steps_that_cannot_be_seen_are_an_error_at_the_second_iteration(through_loss):
    model, loss_of, optimizer, scheduler = start(optimizer_of=lambda model: SAM(sgd(model)))
    iterations = 0
    with pytest.raises(RuntimeError, match=r"moved, and AutoLR saw no step of SAM: .*the one inside, such as"):
        for _ in range(5):
            iterations += 1
            optimizer.zero_grad()
            loss = scheduler.loss(lambda: loss_of(model)) if through_loss else loss_of(model)
            loss.backward()
            optimizer.second_step()
            scheduler.step(*([] if through_loss else [lambda: loss_of(model)]))
    assert iterations == 2
    assert scheduler.last_epoch == 0


def test_the_optimizer_inside_is_seen():
    model, loss_of = problem("mlp")
    optimizer = SAM(sgd(model))
    scheduler = AutoLR(optimizer.base_optimizer, model, evaluator="inplace", **EACH_STEP)
    for _ in range(3):
        prev = parameters_of(model)
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.second_step()
        scheduler.step()
        assert scheduler.last_probe.losses.tolist() == losses_of_copies(model, prev, FACTORS_3, loss_of)
    assert scheduler.last_probe.step == 3


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer that never was initialised as one, and calls the one it holds."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.syncs = True

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        self.optimizer.param_groups = groups

    @property
    def state(self):
        return self.optimizer.state

    @property
    def defaults(self):
        return self.optimizer.defaults

    def zero_grad(self, set_to_none=None):
        if self.syncs:
            self.optimizer.zero_grad()

    def step(self, closure=None):
        if self.syncs:
            self.optimizer.step(closure)


class Holder:
    """No Optimizer at all, as of DeepSpeed and others."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


WRAPPERS = {
    "accelerated": Accelerated,
    "twice": lambda optimizer: Accelerated(Accelerated(optimizer)),
    "holder": Holder,
    "holder of an accelerated": lambda optimizer: Holder(Accelerated(optimizer)),
}


@pytest.mark.parametrize("in_a_list", [False, True])
@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_a_wrapper_without_hooks_is_followed(wrapper, in_a_list):
    model, loss_of = problem("mlp")
    inner = sgd(model, lr=0.03, momentum=0.9)
    optimizer = WRAPPERS[wrapper](inner)
    scheduler = AutoLR([optimizer] if in_a_list else optimizer, model, evaluator="inplace", **EACH_STEP)
    assert scheduler.optimizers == [inner]
    for _ in range(3):
        prev = parameters_of(model)
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        before = everything(model, inner)
        scheduler.step()
        assert_same(before, everything(model, inner))
        assert scheduler.last_probe.losses.tolist() == losses_of_copies(model, prev, FACTORS_3, loss_of)
    assert scheduler.last_probe.step == 3
    assert inner.param_groups[0]["lr"] == scheduler.get_last_lr()[0] != 0.03


def test_steps_that_a_wrapper_leaves_out_are_not_counted():
    model, loss_of = problem("mlp")
    optimizer = Accelerated(sgd(model))
    scheduler = AutoLR(optimizer, model, evaluator="inplace", **EACH_STEP)
    for micro in range(1, 7):
        optimizer.syncs = micro % 3 == 0
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        if optimizer.syncs:
            scheduler.step()
        optimizer.zero_grad()
    assert [probe.step for probe in scheduler.history] == [1, 2]


# Learning rates that something else writes


def rate_of(kind, value):
    return value if kind is float else torch.tensor(value, dtype=kind)


def two_groups(kind):
    def build(model):
        groups = [
            {"params": model[0].parameters(), "lr": rate_of(kind, 0.2)},
            {"params": model[2].parameters(), "lr": rate_of(kind, 0.05)},
        ]
        return torch.optim.SGD(groups)

    return build


def write(group, rate):
    """As schedulers do: a tensor is filled."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def replace(group, rate):
    group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else rate


@pytest.mark.parametrize("by", [write, replace])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
@pytest.mark.parametrize("kind", [float, torch.float32, torch.float64])
def test_a_rate_that_something_else_wrote_is_put_back_and_told_once(kind, which, by, told):
    """The step is taken at AutoLR's own, though the loop goes on writing another one each time."""
    model, loss_of, optimizer, scheduler = start(
        optimizer_of=two_groups(kind), calibration_steps=0, probe_every_steps=2, rule=Rule()
    )
    for step in range(1, 7):
        own = [float(lr) for lr in scheduler.get_last_lr()]
        for index in which:
            by(optimizer.param_groups[index], 1e-5 * step)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        rates = [own[0], own[0], own[1], own[1]]
        for old, p, rate in zip(before, model.parameters(), rates, strict=True):
            torch.testing.assert_close(p.detach(), old - rate * p.grad)
        assert [float(group["lr"]) for group in optimizer.param_groups] == own
        scheduler.step()
    assert [probe.step for probe in scheduler.history] == [2, 4, 6]
    assert len(told) == 1
    message = str(told[0].message)
    assert f"optimizer.param_groups[{max(which)}] was 1e-05 before" in message or len(which) == 2
    assert "was 1e-05 before optimizer.step(), and AutoLR had set 0." in message
    assert told[0].filename == __file__


def test_both_values_are_told():
    model, loss_of, optimizer, _ = start()
    optimizer.param_groups[0]["lr"] = 1e-5
    with pytest.warns(match=r"lr of optimizer.param_groups\[0\] was 1e-05 before optimizer.step\(\), .* set 0.1: "):
        train_step(model, optimizer, loss_of)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_of_several_optimizers_the_one_is_named():
    model, loss_of = problem("mlp")
    optimizers = [sgd(model[0]), sgd(model[2], lr=0.2)]
    scheduler = AutoLR(optimizers, model)
    optimizers[1].param_groups[0]["lr"] = 1e-5
    loss_of(model).backward()
    with pytest.warns(match=r"lr of optimizer\[1\].param_groups\[0\] was 1e-05 .* set 0.2") as caught:
        for optimizer in optimizers:
            optimizer.step()
    assert len(caught) == 1
    assert scheduler.get_last_lr() == [0.1, 0.2]


@pytest.mark.parametrize("between", [False, True])
def test_a_second_scheduler_is_told(between, told):
    """And has no say, whether it steps behind AutoLR or before it; one that writes the same rate is not told."""
    model, loss_of, optimizer, scheduler = start(**EACH_STEP)
    other = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(6):
        own = scheduler.get_last_lr()
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == own
        if between:
            assert len(told) == min(scheduler.last_epoch, 1)  # of the step before
            other.step()
        scheduler.step()
        assert scheduler.last_probe.lr_before == own
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr() == scheduler.level
        if not between:
            other.step()
    assert len(told) == 1
    assert "such as another scheduler" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.parametrize("kind", [float, torch.float32])
def test_equal_rates_that_are_loaded_are_not_told(kind):
    model, loss_of, optimizer, scheduler = start(optimizer_of=two_groups(kind))
    for _ in range(4):
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.last_probe.step == 4


@pytest.mark.parametrize("probed", [False, True])
def test_a_group_that_is_new_may_have_its_own_rate(probed):
    """Also where a state is asked for before its first step, or the closure raises after it."""
    model, loss_of, optimizer, scheduler = start(
        optimizer_of=lambda model: sgd(model[0]),
        calibration_steps=0,
        probe_every_steps=1 if probed else 10,
        rule=Rule(),
    )
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.02})
    scheduler.state_dict()
    train_step(model, optimizer, loss_of)
    if probed:
        with pytest.raises(ZeroDivisionError):
            scheduler.step(lambda: 1 / 0)
    train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))
    first, second = scheduler.get_last_lr()
    assert first / second == pytest.approx(5)


@pytest.mark.parametrize("every", [3, 1000])
def test_steps_of_the_optimizer_that_the_scheduler_does_not_follow_are_told_once(every):
    """As with one call an epoch, or none."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = AutoLR(optimizer, model, calibration_steps=0)

    def train(steps):
        for step in range(1, steps + 1):
            x = torch.randn(12, 5)
            optimizer.zero_grad()
            scheduler.loss(lambda x=x: model(x).square().mean()).backward()
            optimizer.step()
            if step % every == 0:
                scheduler.step()

    train(2)
    with pytest.warns(UserWarning, match="call it after every optimizer.step()") as told:
        train(7)
    assert len([each for each in told if "call it after every" in str(each.message)]) == 1
