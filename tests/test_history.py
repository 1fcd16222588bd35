"""What a run leaves to look at: its probes, and a word where parameters were moved."""

import copy
import itertools
import json
import logging
import math

import pytest
import torch

from autolr_fast import FACTORS_3, AutoLR, Probe, Rule
from autolr_fast.probe import History

from .helpers import between, parameters_of, problem, raise_rate, sgd


def start(lr=1e-3, **options):
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=lr)
    return model, loss_of, optimizer, AutoLR(optimizer, model, evaluator="inplace", **options)


def train(model, loss_of, optimizer, scheduler):
    optimizer.zero_grad()
    scheduler.loss(lambda: loss_of(model)).backward()
    optimizer.step()
    scheduler.step()


def probe(step, retaken=None):
    numbers = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return Probe(step, 1, (2.0, 0.5), numbers, numbers / 3, numbers[0], [0.1], [0.2], [0.3], "inplace", 1, retaken)


def is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return type(value) in (int, float, str, type(None))


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_probe_is_plain_and_comes_back(tensor_lr):
    model, loss_of, optimizer, scheduler = start(torch.tensor(1e-3) if tensor_lr else 1e-3, total_steps=30)
    for _ in range(12):
        train(model, loss_of, optimizer, scheduler)
    for each in scheduler.history:
        plain = each.to_dict()
        assert all(map(is_plain, plain.values()))
        again = Probe.from_dict(json.loads(json.dumps(plain)))
        assert again.to_dict() == plain
        assert repr(again) == repr(each)
        assert torch.equal(again.losses, each.losses)
        assert again.losses.dtype == torch.float64
        assert again.factors == each.factors
    assert plain["step"] == 12
    assert plain["losses"] == scheduler.last_probe.losses.tolist()
    assert plain["lr_after"] == [pytest.approx(float(optimizer.param_groups[0]["lr"]))]
    assert plain["retaken"] is None
    assert scheduler.history[0].to_dict()["retaken"] > 1


def test_losses_that_are_not_finite_come_back_too():
    seen = probe(3)
    seen.losses[0] = math.nan
    assert math.isnan(Probe.from_dict(json.loads(json.dumps(seen.to_dict()))).losses[0])


@pytest.mark.usefixtures("every_probe")
def test_the_history_has_every_probe_and_the_last_one_last():
    model, loss_of, optimizer, scheduler = start(calibration_steps=3, probe_every_steps=5)
    assert scheduler.history == []
    assert scheduler.last_probe is None
    steps = []
    for step in range(1, 17):
        train(model, loss_of, optimizer, scheduler)
        assert scheduler.last_probe is scheduler.history[-1]
        if scheduler.last_probe.step == step:
            steps.append(step)
    assert [each.step for each in scheduler.history] == steps == [1, 2, 3, 10, 15]  # at 5 too little is known


@pytest.mark.parametrize("count", [1999, 2000, 2001, 3003, 9999])
def test_a_long_history_is_thinned(count):
    """Evenly over the run; those that took steps again stay, and so does the last."""
    history, retaken = History(), {1, 4, 17, 1002}
    for step in range(1, count + 1):
        history.add(probe(step, 0.5 if step in retaken else None))
        assert history[-1].step == step
    steps = [each.step for each in history]
    assert steps == sorted(set(steps))
    assert retaken <= set(steps)
    assert min(count, 500) <= len(steps) <= 2000
    assert (len(steps) == count) == (count <= 2000)
    regular = [step for step in steps if step not in retaken]
    gaps = [after - before for before, after in itertools.pairwise(regular)]
    assert max(gaps) <= max(1, count / 400)
    thinned = History.read(history.state())
    assert [each.to_dict() for each in thinned] == [each.to_dict() for each in history]


@pytest.mark.usefixtures("every_probe")
def test_a_history_is_restored_with_the_state():
    model, loss_of, optimizer, scheduler = start()
    for _ in range(4):
        train(model, loss_of, optimizer, scheduler)
    _, _, _, resumed = start()
    history = resumed.history
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert resumed.history is history
    assert [each.to_dict() for each in history] == [each.to_dict() for each in scheduler.history]
    assert resumed.last_probe.step == 4
    for each in (resumed, scheduler):  # of its moment
        state = each.state_dict()
        each.history.clear()
        assert len(state["history"]) == 4


def change(plain, **changes):
    return [{**plain[0], **changes}, *plain[1:]]


@pytest.mark.parametrize(
    ("foreign", "says"),
    [
        (lambda plain: None, "'NoneType'"),
        (lambda plain: [3], "'int'"),
        (lambda plain: change(plain, loss=1.0), "'loss'"),
        (lambda plain: [{key: value for key, value in plain[0].items() if key != "losses"}], "'losses'"),
        (lambda plain: [{key: value for key, value in plain[0].items() if key != "step"}], "'step'"),
        (lambda plain: change(plain, factors=2.0), "'float'"),
        (lambda plain: change(plain, losses=["high", "low"]), "'str'"),
    ],
)
def test_a_history_that_is_not_known_is_told_and_nothing_is_loaded(foreign, says):
    model, loss_of, optimizer, scheduler = start(calibration_steps=0)
    for _ in range(22):
        train(model, loss_of, optimizer, scheduler)
    state = scheduler.state_dict()
    assert len(state["history"]) == 1
    _, _, _, other = start(calibration_steps=0)
    before = str(other.state_dict())
    with pytest.raises(ValueError, match=says):
        other.load_state_dict({**state, "history": foreign(state["history"])})
    assert str(other.state_dict()) == before


def test_the_history_is_not_assigned():
    model, loss_of, optimizer, scheduler = start()
    train(model, loss_of, optimizer, scheduler)
    with pytest.raises(AttributeError):
        scheduler.history = []
    assert len(scheduler.history) == 1


@pytest.mark.usefixtures("every_probe")
def test_a_probe_is_itself_alone():
    """Tensors have no truth value to compare by; so it is found in a list, and is a key."""
    model, loss_of, optimizer, scheduler = start()
    for _ in range(3):
        train(model, loss_of, optimizer, scheduler)
    first, second, third = scheduler.history
    assert first == first  # noqa: PLR0124
    assert first != second
    assert third != Probe.from_dict(third.to_dict())
    assert [scheduler.history.index(each) for each in (first, second, third)] == [0, 1, 2]
    assert third in scheduler.history
    assert Probe.from_dict(third.to_dict()) not in scheduler.history
    assert {first: 1, second: 2, third: 3}[second] == 2


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("lr0", [1e-6, 1e-2, 10.0])
def test_retaken_says_where_parameters_moved(lr0, caplog):
    """At the first step, and where a rate was far too high; each time one line tells it, and none elsewhere."""
    caplog.set_level(logging.INFO, logger="autolr_fast")
    model, loss_of, optimizer, scheduler = start(lr0, rule=Rule(FACTORS_3, window_steps=1), calibration_steps=8)
    moved_at = []
    for step in range(1, 13):
        if step == 6:
            raise_rate(scheduler, 1000)
        prev = parameters_of(model)
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        stepped, lines, before = parameters_of(model), len(caplog.records), scheduler.last_probe
        scheduler.step()
        is_new = scheduler.last_probe is not before
        ratio = scheduler.last_probe.retaken if is_new else None
        moved = not all(map(torch.equal, stepped.values(), parameters_of(model).values()))
        assert moved == (ratio is not None) == (len(caplog.records) > lines)
        if not moved:
            continue
        moved_at.append(step)
        for name, parameter in model.named_parameters():
            expected = between(prev[name], stepped[name], ratio)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)
        record = caplog.records[-1]
        assert (record.name, record.levelno, len(caplog.records)) == ("autolr_fast", logging.INFO, lines + 1)
        what = f"took the last steps again, {ratio:g} times as long" if ratio else "undid the last steps"
        assert f"{what}, and moved the parameters" in record.getMessage()
        assert repr(scheduler.last_probe) in record.getMessage()
        assert f"retaken={ratio:.4g}, " in repr(scheduler.last_probe)
    assert moved_at == [1, 6]


def test_a_first_step_that_suits_is_not_taken_again(caplog):
    """f(w) = (w - 20)^2 / 2 from 22, at the rate 1; nothing moves, and nothing is said."""
    caplog.set_level(logging.INFO, logger="autolr_fast")
    w = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.tensor([22.0], dtype=torch.float64))})
    optimizer = sgd(w, lr=1.0)
    scheduler = AutoLR(optimizer, w, evaluator="inplace", rule=Rule((2.0, 1.0, 0.5)))
    scheduler.loss(lambda: (w["w"] - 20).square().sum() / 2).backward()
    optimizer.step()
    left = copy.deepcopy(w)
    scheduler.step()
    assert torch.equal(left["w"], w["w"])
    assert scheduler.last_probe.factor == 1.0
    assert scheduler.last_probe.retaken is None
    assert not caplog.records
