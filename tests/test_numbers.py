"""Numbers of NumPy are taken wherever numbers are, and never kept: states load with ``weights_only=True``."""

import fractions
import io

import numpy
import pytest
import torch
import torch.nn.functional as F

from autolr_fast import ALRTree, AutoLR, Rule, Stacked
from autolr_fast._arguments import check_count, check_fraction, check_limits
from autolr_fast._level.annealing import check_multiplier
from autolr_fast._machine.memory import check_max_memory
from autolr_fast._steps import ProbeSchedule
from autolr_fast._tree.arguments import check_lrs

from .helpers import mlp, sgd

COUNTS = [numpy.int64(3), numpy.int32(3), numpy.uint8(3), 3]
NUMBERS = [numpy.float64(0.25), numpy.float32(0.25), numpy.float16(0.25), fractions.Fraction(1, 4), 0.25]
NO_COUNTS = [True, numpy.bool_(True), numpy.float64(3.0), 3.0, "3", None]
NO_NUMBERS = [True, numpy.bool_(True), "0.25", None]


@pytest.mark.parametrize("value", COUNTS, ids=type)
def test_counts_become_pythons(value):
    window, windows = Rule(window_steps=value).window_steps, Rule(window_steps=[value, 4]).window_steps
    counts = [check_count("n", value, 1), check_max_memory(value), Stacked(value).max_memory, window, *windows[:1]]
    schedule = ProbeSchedule(value, value, (1,))
    counts += [schedule.every_steps, schedule.first_steps]
    assert {(type(count), count) for count in counts} == {(int, 3)}


@pytest.mark.parametrize("value", NUMBERS, ids=type)
def test_numbers_become_pythons(value):
    check_multiplier(lambda fraction: value, 0.5, value)
    numbers = [
        check_fraction("f", value, "steps"),
        *check_limits((value, value)),
        *check_lrs(value),
        *check_lrs([value]),
    ]
    assert {(type(number), number) for number in numbers} == {(float, 0.25)}


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_what_is_no_count(value):
    for check in (lambda: check_count("n", value, 1), lambda: Rule(window_steps=(1, value))):
        with pytest.raises(TypeError, match="expected a whole number"):
            check()
    if value is not None:
        with pytest.raises(ValueError, match="max_memory=.*whole number of bytes"):
            check_max_memory(value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="expected a fraction"):
        check_fraction("f", value, "steps")
    with pytest.raises(ValueError, match="lr_limits="):
        check_limits((value, 1.0))
    with pytest.raises(ValueError, match="lr="):
        check_lrs([value])


def scheduler_of(model, whole, real):
    optimizer = torch.optim.SGD(model.parameters(), lr=real(0.125))
    return optimizer, AutoLR(
        optimizer,
        model,
        total_steps=whole(40),
        probe_every_steps=whole(2),
        probe_until_fraction=real(0.5),
        calibration_steps=whole(3),
        max_heat=real(0.25),
        anneal=lambda done: real(1 - done),
        lr_limits=(real(2.0**-20), real(8.0)),
        rule=Rule(factors=[real(2.0), real(0.5)], window_steps=(whole(1), whole(2))),
        evaluator=Stacked(max_memory=whole(2**20)),
    )


def run(whole, real):
    """A training, saved and loaded half-way."""
    torch.manual_seed(0)
    model = mlp()
    optimizer, scheduler = scheduler_of(model, whole, real)
    rates = []
    for step in range(12):
        x, y = torch.randn(12, 5), torch.randint(3, (12,))
        optimizer.zero_grad()
        scheduler.loss(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        scheduler.step()
        rates += scheduler.get_last_lr()
        if step == 6:
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], saved)
            saved.seek(0)
            states = torch.load(saved, weights_only=True)
            model = mlp()
            optimizer, scheduler = scheduler_of(model, whole, real)
            for part, state in zip((model, optimizer, scheduler), states, strict=True):
                part.load_state_dict(state)
    return rates, repr(scheduler)


@pytest.mark.parametrize("real", [numpy.float64, numpy.float32])
@pytest.mark.parametrize("whole", [numpy.int64, numpy.int32])
def test_a_training_with_numbers_of_numpy_is_that_with_pythons(whole, real):
    def as_precise(value):  # what the callable returns is rounded alike
        return float(real(value))

    assert run(whole, real) == run(int, as_precise)


def test_a_tree_with_numbers_of_numpy():
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    results = []
    for whole, real in ((int, float), (numpy.int64, numpy.float32)):
        torch.manual_seed(0)
        options = {"momentum": real(0.5)}
        tree = ALRTree(
            mlp(),
            F.cross_entropy,
            lr=real(0.125),
            beams=whole(2),
            factors=[real(2.0), real(0.5)],
            optimizer_options=options,
            max_memory=whole(2**20),
            method="batched",
        )
        tree.fit([(x, y)] * 2, epochs=whole(2))
        saved = io.BytesIO()
        torch.save(tree.state_dict(), saved)
        saved.seek(0)
        torch.load(saved, weights_only=True)
        results.append((tree.learning_rates, repr(tree)))
    assert results[0] == results[1]


def test_a_rate_of_numpy_in_a_param_group():
    model = mlp()
    optimizer = sgd(model, lr=numpy.float32(0.125))
    scheduler = AutoLR(optimizer, model)
    assert [(type(rate), rate) for rate in scheduler.get_last_lr() + scheduler.level] == [(float, 0.125)] * 2
