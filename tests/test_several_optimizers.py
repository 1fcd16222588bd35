"""Several optimizers of one model are one to AutoLR, and one optimizer may move a part of it."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import FACTORS_5, AutoLR, ClosureError, Rule

from .helpers import (
    assert_same,
    between,
    everything,
    from_states,
    losses_of_copies,
    mlp,
    parameters_of,
    problem,
    raise_rate,
    random_states,
    sgd,
)

EACH_STEP = {"calibration_steps": 0, "probe_every_steps": 1, "rule": Rule(FACTORS_5, window_steps=1)}


def muon_and_adamw(model):
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2]
    return [
        torch.optim.Muon(matrices, lr=0.02),
        torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=3e-3),
    ]


def sgd_and_adam(model):
    half = len(list(model.parameters())) // 2
    parameters = list(model.parameters())
    return [
        torch.optim.Adam(parameters[half:], lr=0.02),
        torch.optim.SGD(parameters[:half], lr=0.1, momentum=0.9),
    ]


PAIRS = {"muon and adamw": muon_and_adamw, "sgd and adam": sgd_and_adam}


def start(pair="muon and adamw", name="mlp", **options):
    model, loss_of = problem(name)
    optimizers = PAIRS[pair](model)
    scheduler = AutoLR(optimizers, model, evaluator=options.pop("evaluator", "inplace"), **options)
    return model, loss_of, optimizers, scheduler


def backward(model, loss_of, optimizers, scheduler):
    for optimizer in optimizers:
        optimizer.zero_grad()
    scheduler.loss(lambda: loss_of(model)).backward()


def train(model, loss_of, optimizers, scheduler):
    backward(model, loss_of, optimizers, scheduler)
    for optimizer in optimizers:
        optimizer.step()
    scheduler.step()


def rates(optimizers):
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def everything_of(model, optimizers):
    return [tensor for optimizer in optimizers for tensor in everything(model, optimizer)]


FEW = {"calibration_steps": 0, "probe_every_steps": 4, "evaluator": "inplace"}


def two_of(model):
    """Optimizers of all but one weight, which is frozen."""
    model[2].weight.requires_grad_(False)
    return [sgd(model[0], lr=0.1), torch.optim.Adam([model[2].bias], lr=0.03)]


def add_the_third(model, optimizers):
    """Give that weight to the first of them."""
    model[2].weight.requires_grad_(True)
    optimizers[0].add_param_group({"params": [model[2].weight], "lr": 0.02})


# One level, one line, one count


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_their_rates_keep_their_ratios(pair):
    model, loss_of, optimizers, scheduler = start(pair, total_steps=30)
    first, second = rates(optimizers)
    assert scheduler.optimizers == optimizers
    assert scheduler.optimizer is optimizers[0]
    for _ in range(25):
        train(model, loss_of, optimizers, scheduler)
        now = rates(optimizers)
        assert now[0] / now[1] == pytest.approx(first / second)
        assert scheduler.get_last_lr() == now
        assert scheduler.level[0] / scheduler.level[1] == pytest.approx(first / second)
    assert now[0] != pytest.approx(first, rel=0.01)
    assert len(scheduler.history) == 20


@pytest.mark.parametrize("evaluator", ["inplace", "streamed", "stacked", "graphed"])
@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_a_line_goes_through_what_all_of_them_did(pair, evaluator):
    model, loss_of, optimizers, scheduler = start(pair, evaluator=evaluator, **EACH_STEP)
    for _ in range(3):
        prev = parameters_of(model)
        backward(model, loss_of, optimizers, scheduler)
        for optimizer in optimizers:
            optimizer.step()
        before = everything_of(model, optimizers)
        scheduler.step()
        assert_same(before, everything_of(model, optimizers))
        expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
        exact = {"rel": 1e-5} if evaluator == "stacked" else {"rel": 0, "abs": 0}
        assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, **exact)
        assert not any(map(torch.equal, prev.values(), parameters_of(model).values()))


def test_a_gradient_is_scaled_by_the_rate_of_its_optimizer():
    model, loss_of, optimizers, scheduler = start(**{**EACH_STEP, "rule": Rule(FACTORS_5, direction="gradient")})
    backward(model, loss_of, optimizers, scheduler)
    lrs = {p: group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for optimizer in optimizers:
        optimizer.step()
    scheduler.step()
    expected = []
    for factor in FACTORS_5:
        candidate = copy.deepcopy(model)
        gradients = torch.autograd.grad(loss_of(candidate), list(candidate.parameters()))
        with torch.no_grad():
            for p, live, gradient in zip(candidate.parameters(), model.parameters(), gradients, strict=True):
                p.sub_(factor * lrs[live] * gradient)
        expected.append(loss_of(candidate).item())
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("iterations", "counts", "told"),
    [
        (["ab", "ab", "ab"], [1, 2, 3], []),
        (["ba", "ab", "ba"], [1, 2, 3], []),
        (["aab", "bba"], [1, 2], []),
        (["", "ab", "", "ba"], [0, 1, 1, 2], ["scheduler.loss was called twice"]),
        (["a", "ab", "a", "a", "ab"], [0, 1, 1, 1, 2], ["AdamW did not step"]),
        (["b", "ba", "a", "b", "ab"], [0, 1, 1, 1, 2], ["Muon did not step", "AdamW did not step"]),
    ],
)
def test_a_step_is_counted_when_each_has_stepped(iterations, counts, told):
    """In any order; what one of them did alone is told and no step, and the next line begins behind it."""
    model, loss_of, optimizers, scheduler = start(**EACH_STEP)
    steps = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for iteration in iterations:
            backward(model, loss_of, optimizers, scheduler)
            prev = parameters_of(model)
            for each in iteration:
                optimizers["ab".index(each)].step()
            seen = len(scheduler.history)
            if iteration:
                scheduler.step()
            steps.append(scheduler.last_epoch)
            if {*iteration} == {"a", "b"}:
                expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
                assert scheduler.last_probe.losses.tolist() == expected
            else:
                assert len(scheduler.history) == seen
    assert steps == counts
    assert len(caught) == len(told)
    for each, message in zip(caught, told, strict=True):
        assert str(each.message).startswith(message)


def test_the_line_of_several_steps_counts_those_of_all():
    model, loss_of, optimizers, scheduler = start(
        calibration_steps=0, probe_every_steps=3, rule=Rule(FACTORS_5, window_steps=2)
    )
    history = []
    for _ in range(6):
        history.append(parameters_of(model))
        train(model, loss_of, optimizers, scheduler)
    assert [probe.step for probe in scheduler.history] == [3, 6]
    expected = losses_of_copies(model, history[4], FACTORS_5, loss_of)
    assert scheduler.last_probe.losses.tolist() == expected


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_a_first_step_that_is_taken_again_moves_what_all_of_them_moved(pair):
    model, loss_of, optimizers, scheduler = start(pair)
    prev = parameters_of(model)
    backward(model, loss_of, optimizers, scheduler)
    for optimizer in optimizers:
        optimizer.step()
    stepped = parameters_of(model)
    scheduler.step()
    ratio = scheduler.last_probe.retaken
    assert ratio not in (None, 1.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), between(prev[name], stepped[name], ratio))
        assert not torch.equal(parameter, stepped[name])


@pytest.mark.usefixtures("every_probe")
def test_steps_that_blow_the_loss_up_are_taken_again_in_all_of_them():
    model, loss_of, optimizers, scheduler = start("sgd and adam", rule=Rule(window_steps=1))
    for _ in range(5):
        train(model, loss_of, optimizers, scheduler)
    raise_rate(scheduler, 1000)
    prev = parameters_of(model)
    backward(model, loss_of, optimizers, scheduler)
    for optimizer in optimizers:
        optimizer.step()
    blown, loss = parameters_of(model), loss_of(model).item()
    scheduler.step()
    assert scheduler.last_probe.retaken < 0.5
    assert loss_of(model).item() < loss / 4
    for name, parameter in model.named_parameters():
        expected = between(prev[name], blown[name], scheduler.last_probe.retaken)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("every_probe")
def test_running_statistics_are_those_of_training_alone():
    """With a scheduler for each of two parts of one network they were updated by the probes of both."""
    model, _ = problem("convnet")
    twin = copy.deepcopy(model)
    optimizers = muon_and_adamw(model)
    scheduler = AutoLR(optimizers, model, evaluator="inplace")
    x = torch.randn(12, 2, 4, 4)
    for _ in range(12):
        backward(model, lambda model: model(x).square().mean(), optimizers, scheduler)
        with torch.no_grad():
            twin.load_state_dict({**twin.state_dict(), **dict(model.named_parameters())})
            twin(x)
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
    assert len(scheduler.history) == 12
    assert model[1].num_batches_tracked.item() == 12
    assert_same(list(twin.buffers()), list(model.buffers()))


@pytest.mark.parametrize("at", [2, 4, 5])
@pytest.mark.parametrize("saved", [False, True])
def test_a_group_added_to_the_first_of_them_is_the_last(saved, at):
    """Also where a state is asked for in between, or a rate is written."""
    model, loss_of = problem("mlp")
    optimizers = two_of(model)
    scheduler = AutoLR(optimizers, model, rule=Rule(), **FEW)
    for step in range(1, 10):
        if step == at:
            before = rates(optimizers)
            add_the_third(model, optimizers)
            if saved:
                scheduler.state_dict()
        train(model, loss_of, optimizers, scheduler)
    first, new, second = rates(optimizers)
    assert [p.step for p in scheduler.history] == [4, 8]
    assert [len(p.lr_after) for p in scheduler.history] == [2 if step < at else 3 for step in (4, 8)]
    assert first / second == pytest.approx(0.1 / 0.03)
    assert new / first == pytest.approx(0.02 / before[0])
    assert scheduler.get_last_lr() == scheduler.level == [first, second, new]
    assert scheduler.last_probe.lr_after == scheduler.last_probe.level_after == [first, second, new]
    ratios = [base / scheduler.base_lrs[0] for base in scheduler.base_lrs]
    assert ratios == pytest.approx([1, 0.3, 0.02 / before[0]])


@pytest.mark.parametrize("cut", [5, 6, 7, 8])
def test_a_state_knows_which_group_came_when(cut):
    """In a process that starts with all three, the run goes on bit for bit; also from inside of a window."""
    model, loss_of = problem("mlp")
    optimizers = two_of(model)
    scheduler = AutoLR(optimizers, model, **FEW)
    lrs = []
    for step in range(1, 13):
        if step == 5:
            add_the_third(model, optimizers)
        train(model, loss_of, optimizers, scheduler)
        if step == cut:
            states = copy.deepcopy(
                [model.state_dict(), *(each.state_dict() for each in optimizers), scheduler.state_dict()]
            )
        elif step > cut:
            lrs.append(rates(optimizers))
    other, _ = problem("mlp")
    others = two_of(other)
    add_the_third(other, others)
    resumed = AutoLR(others, other, **FEW)
    for each, state in zip([other, *others, resumed], states, strict=True):
        each.load_state_dict(state)
    again = []
    for _ in range(cut, 12):
        train(other, loss_of, others, resumed)
        again.append(rates(others))
    assert again == lrs
    assert_same(everything_of(model, optimizers), everything_of(other, others))
    assert str(resumed.state_dict()) == str(scheduler.state_dict())


def test_a_state_that_is_refused_leaves_the_order_of_the_groups():
    model, loss_of = problem("mlp")
    optimizers = two_of(model)
    scheduler = AutoLR(optimizers, model, **FEW)
    add_the_third(model, optimizers)
    state = scheduler.state_dict()
    assert state["groups"] == [[0, 0], [1, 0], [0, 1]]
    snapshots = {**state["snapshots"], "windows": [(0, [torch.ones(2)], [])]}
    for change, says in [
        ({"groups": [[0, 0], [0, 1], [1, 0]], "snapshots": snapshots}, "has the snapshot of 1 parameters"),
        ({"groups": [[0, 0], [1, 0], [1, 1]]}, "give the optimizer the same groups"),
        ({"groups": [[0, 0], [1, 0]]}, "of 2 param groups and the optimizer has 3"),
    ]:
        with pytest.raises(ValueError, match=says):
            scheduler.load_state_dict({**state, **change})
        assert str(scheduler.state_dict()) == str(state)
    train(model, loss_of, optimizers, scheduler)
    first, new, second = rates(optimizers)
    assert scheduler.get_last_lr() == [first, second, new]


@pytest.mark.parametrize("which", [0, 1])
def test_a_group_that_is_gone_is_told(which):
    model, loss_of = problem("mlp")
    optimizers = two_of(model)
    scheduler = AutoLR(optimizers, model, **FEW)
    add_the_third(model, optimizers)
    train(model, loss_of, optimizers, scheduler)
    del optimizers[which].param_groups[-1]
    with pytest.raises(
        ValueError,
        match="has 2 param groups and had 3, and one of those is gone: groups can be added, not removed.*freeze",
    ):
        train(model, loss_of, optimizers, scheduler)


@pytest.mark.parametrize(("steps", "left"), [("a", "AdamW"), ("b", "Muon")])
@pytest.mark.parametrize("complete", [False, True])
def test_a_training_in_which_no_step_is_one_of_all_is_refused(complete, steps, left):
    """After twenty iterations from the start; a single step of all makes it a warning."""
    model, loss_of, optimizers, scheduler = start(**EACH_STEP)
    stepping = optimizers["ab".index(steps)]
    message = rf"^{left} did not step in an iteration in which {type(stepping).__name__} did. A step counts when"
    refused = pytest.raises(RuntimeError, match=rf"{message}.*\. This is so in all of the first 20 iterations$")
    if complete:
        train(model, loss_of, optimizers, scheduler)
    iterations = 0
    with pytest.warns(match=message) as caught, contextlib.nullcontext() if complete else refused:
        while iterations < 50:
            iterations += 1
            backward(model, loss_of, optimizers, scheduler)
            stepping.step()
            scheduler.step()
    assert iterations == (50 if complete else 20)
    assert len(caught) == 1
    assert scheduler.last_epoch == int(complete)


def test_a_closure_that_steps_the_second_is_refused():
    model, loss_of, optimizers, scheduler = start()
    backward(model, loss_of, optimizers, scheduler)
    for optimizer in optimizers:
        optimizer.step()
    before = everything_of(model, optimizers)

    def closure():
        optimizers[1].step()
        return loss_of(model)

    with pytest.raises(ClosureError, match=r"called optimizer.step\(\)"):
        scheduler.step(closure)
    assert_same(before, everything_of(model, optimizers))


# What is refused


def model_and(build):
    model = mlp()
    return model, build(model[0].parameters(), model[2].parameters())


SGD = torch.optim.SGD


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda a, b: [], ValueError, r"optimizer=\[\] is empty: give one optimizer, or a list"),
        (lambda a, b: [SGD(a, lr=0.1)] * 2, ValueError, "the list has one optimizer twice"),
        (
            lambda a, b: [SGD([*(a := list(a)), *b], lr=0.1), torch.optim.Adam(a[1:])],
            ValueError,
            "parameter '0.bias' is in two of the optimizers",
        ),
        (
            lambda a, b: [SGD(a, lr=0.1, maximize=True), torch.optim.Adam(b)],
            ValueError,
            "maximize=True in some param groups only",
        ),
        (lambda a, b: [SGD(a, lr=0.1), list(b)], TypeError, "expected a torch.optim.Optimizer, or a list of them"),
        (lambda a, b: [SGD(a, lr=0.1), torch.optim.LBFGS(b)], ValueError, "optimizer=LBFGS: its step is a whole"),
        (
            lambda a, b: [SGD(a, lr=0.1), torch.optim.Adam(b, differentiable=True)],
            ValueError,
            "differentiable=True",
        ),
        (
            lambda a, b: [SGD([{"params": [p]} for p in a], lr=0.1), SGD(mlp().parameters(), lr=0.1)],
            ValueError,
            r"optimizer\[1\].param_groups\[0\]\['params'\]\[0\] .* is not a parameter of the model",
        ),
        (
            lambda a, b: [SGD(a, lr=0.1), SGD([{"params": [p], "lr": 1e5 * n} for n, p in enumerate(b)], lr=0.1)],
            ValueError,
            r"lr=100000.0 of optimizer\[1\].param_groups\[1\] is outside lr_limits",
        ),
    ],
)
def test_lists_that_are_refused(build, error, says):
    model, optimizers = model_and(build)
    with pytest.raises(error, match=says):
        AutoLR(optimizers, model)


def test_a_tuple_is_a_list():
    model, optimizers = model_and(lambda a, b: (SGD(a, lr=0.1), torch.optim.Adam(b)))
    assert AutoLR(optimizers, model).optimizers == list(optimizers)


def test_a_state_of_another_number_of_groups_is_refused():
    model, _, _, scheduler = start()
    other = AutoLR(sgd(model), model, evaluator="inplace")
    with pytest.raises(ValueError, match="of 2 param groups and the optimizer has 1"):
        other.load_state_dict(scheduler.state_dict())
    with pytest.raises(ValueError, match="of 1 param groups and the optimizer has 2"):
        scheduler.load_state_dict(other.state_dict())


# Models that hold more than the optimizer moves


def test_the_two_networks_of_a_gan_leave_each_other_alone():
    """A probe of one finds the other's gradients, statistics and weights as they are."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    critic = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
    both = nn.ModuleList([generator, critic])
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in both]
    schedulers = [AutoLR(each, both, evaluator="inplace", **EACH_STEP) for each in optimizers]
    for _ in range(6):
        for part, optimizer, scheduler in zip(both, optimizers, schedulers, strict=True):
            z, real, states = torch.randn(8, 4), torch.randn(8, 5), random_states()

            def loss_of(both, part=part, z=z, real=real):
                fake = both[1](both[0](z))
                if part is generator:
                    return F.softplus(-fake).mean()
                return (F.softplus(fake) + F.softplus(-both[1](real))).mean()

            prev = parameters_of(both)
            optimizer.zero_grad()
            scheduler.loss(lambda: loss_of(both)).backward()
            optimizer.step()
            before = everything_of(both, optimizers)
            scheduler.step()
            assert_same(before, everything_of(both, optimizers))
            expected = losses_of_copies(both, prev, FACTORS_5, from_states(states, loss_of))
            assert scheduler.last_probe.losses.tolist() == expected
    assert generator[1].num_batches_tracked.item() == 12
    assert critic[1].num_batches_tracked.item() == 18
    assert [scheduler.last_probe.step for scheduler in schedulers] == [6, 6]


class Centred(nn.Module):
    """As in self-distillation: the centre of the targets is a buffer that each call updates."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.calls = 0

    def forward(self, scores, targets):
        wanted = ((targets - self.centre) / 0.04).softmax(1)
        self.centre.lerp_(targets.mean(0), 0.1)
        self.calls += 1
        return -(wanted * scores.log_softmax(1)).sum(1).mean()


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("calibration", [0, 6])
def test_a_criterion_with_buffers_rides_along(calibration):
    model, teacher, criterion = mlp(), mlp().requires_grad_(False), Centred()
    twin = copy.deepcopy(criterion)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {**EACH_STEP, "calibration_steps": calibration}
    scheduler = AutoLR(optimizer, nn.ModuleList([model, criterion]), evaluator="inplace", **settings)
    for step in range(6):
        x = torch.randn(12, 5)
        optimizer.zero_grad()
        scheduler.loss(lambda x=x: criterion(model(x), teacher(x))).backward()
        twin(model(x), teacher(x))
        optimizer.step()
        changed = "or what the model keeps from one forward to the next"  # as the centre
        with pytest.warns(match=changed) if step == 0 else contextlib.nullcontext():
            scheduler.step()
        assert torch.equal(criterion.centre, twin.centre)
        assert criterion.calls == twin.calls
    assert len(scheduler.history) == 6


@pytest.mark.usefixtures("every_probe")
def test_what_no_optimizer_holds_does_not_move():
    """Whether it has a gradient or not."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model[0])
    own = [p.detach().clone() for p in model[2].parameters()]
    scheduler = AutoLR(optimizer, model, evaluator="inplace", rule=Rule(FACTORS_5, window_steps=1))
    for _ in range(4):
        prev = parameters_of(model)
        model.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        scheduler.step()
        assert_same(own, [p.detach().clone() for p in model[2].parameters()])
        if scheduler.last_probe.retaken is None:
            expected = losses_of_copies(model, prev, (1.0, 0.0), loss_of)
            assert scheduler.last_probe.losses.tolist() == expected
    assert scheduler.last_probe.step == 4
