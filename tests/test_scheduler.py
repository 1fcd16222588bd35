import copy
import gc
import io
import json
import math
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import (
    FACTORS_2,
    FACTORS_3,
    FACTORS_5,
    FACTORS_7,
    ALRTree,
    AutoLR,
    ClosureError,
    InPlace,
    Probe,
    Rule,
    reference,
)

from .helpers import (
    MODELS,
    ON_GPU,
    OPTIMIZERS,
    Recurrent,
    assert_same,
    convnet,
    everything,
    losses_of_copies,
    mlp,
    parameters_of,
    problem,
    sgd,
    train_step,
)


def source_lr(losses, lr, factors, multiplier=1.0):
    """The reference's rule, with the log-factor scaled by the annealing multiplier."""
    return lr * (reference.next_lr(losses, 1.0, factors)) ** multiplier


# The rule


@pytest.mark.parametrize("factors", [FACTORS_3, FACTORS_5, FACTORS_7])
@pytest.mark.parametrize("direction", ["step", "gradient"])
def test_paper_is_the_source(factors, direction):
    """Plain SGD, one batch: the loop over deep copies gives the same learning rates step by step."""
    model, _ = problem("mlp")
    model.double()
    x = MODELS["mlp"][1]().double()

    def loss(model):
        return F.cross_entropy(model(x), torch.arange(12) % 3)

    optimizer = sgd(model, lr=0.05)
    scheduler = AutoLR.paper(
        optimizer, model, rule=Rule(factors=factors, direction=direction, window_steps=1), evaluator="inplace"
    )
    for _ in range(12):
        lr = optimizer.param_groups[0]["lr"]
        before = copy.deepcopy(model)
        train_step(model, optimizer, loss)
        # the step is lr * grad(before); a fresh gradient is taken after it
        expected = reference.candidate_losses(before if direction == "step" else model, loss, lr, factors)
        scheduler.step(lambda: loss(model))
        assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-12)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.next_lr(expected, lr, factors), rel=1e-9)


def test_gradient_direction_equals_the_reference_bitwise():
    model, loss_of = problem("convnet")
    optimizer = sgd(model, lr=0.05, momentum=0.9)
    scheduler = AutoLR(
        optimizer,
        model,
        rule=Rule(factors=FACTORS_7, direction="gradient"),
        probe_every_steps=2,
        calibration_steps=0,
        evaluator="inplace",
    )
    for step in range(1, 7):
        train_step(model, optimizer, loss_of)
        lr = optimizer.param_groups[0]["lr"]
        expected = reference.candidate_losses(model, loss_of, lr, FACTORS_7)
        before = everything(model, optimizer)
        scheduler.step(lambda: loss_of(model))
        assert_same(before, everything(model, optimizer))
        if step % 2 == 0:
            assert scheduler.last_probe.losses.tolist() == expected
            assert scheduler.last_probe.window == 0


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("window", [1, 2, (1, 2), 3])
def test_every_optimizer(name, window):
    """The line is through what the optimizer really did, and nothing but the learning rate changes."""
    if name == "adagrad-fused" and ON_GPU:
        pytest.skip("torch has it on the CPU alone")
    cls, kwargs = OPTIMIZERS[name]
    model, loss_of = problem("convnet")
    optimizer = cls(model.parameters(), **kwargs)
    scheduler = AutoLR(
        optimizer,
        model,
        probe_every_steps=2,
        rule=Rule(window_steps=window),
        calibration_steps=0,
        max_heat=math.inf,
        evaluator="inplace",
    )
    twin = copy.deepcopy(model)
    twin_optimizer = cls(twin.parameters(), **kwargs)
    windows = [window] if isinstance(window, int) else window
    history = []
    for step in range(1, 9):
        for group, other in zip(optimizer.param_groups, twin_optimizer.param_groups, strict=True):
            other["lr"] = group["lr"]
        history.append(parameters_of(model))
        with torch.random.fork_rng():
            train_step(twin, twin_optimizer, loss_of)
        train_step(model, optimizer, loss_of)
        before, lr = everything(model, optimizer), optimizer.param_groups[0]["lr"]
        scheduler.step(lambda: loss_of(model))
        assert_same(before, everything(model, optimizer))
        if step % 2 == 0:
            used = min(windows[(step // 2) % len(windows)], step)
            expected = losses_of_copies(model, history[step - used], FACTORS_2, loss_of)
            losses = scheduler.last_probe.losses.tolist()
            assert losses == expected
            assert scheduler.last_probe.window == used
            wanted = [-loss for loss in losses] if kwargs.get("maximize") else losses
            assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.next_lr(wanted, lr, FACTORS_2))
        else:
            assert optimizer.param_groups[0]["lr"] == lr
    assert scheduler.last_probe.step == 8
    assert_same(list(parameters_of(model).values()), list(parameters_of(twin).values()))


def test_annealing_scales_rate_and_log_factor():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.05)
    scheduler = AutoLR(
        optimizer,
        model,
        probe_every_steps=1,
        probe_until_fraction=1.0,
        rule=Rule(window_steps=1),
        max_heat=math.inf,
        calibration_steps=0,
        total_steps=20,
        evaluator="inplace",
    )
    level = 0.05
    for step in range(1, 20):
        previous = parameters_of(model)
        train_step(model, optimizer, loss_of)
        expected = losses_of_copies(model, previous, FACTORS_2, loss_of)
        scheduler.step(lambda: loss_of(model))
        losses = scheduler.last_probe.losses.tolist()
        assert losses == pytest.approx(expected, rel=1e-6)
        multiplier = (1 + math.cos(math.pi * step / 20)) / 2
        level = source_lr(losses, level, FACTORS_2, multiplier)
        assert scheduler.level[0] == pytest.approx(level, rel=1e-9)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(level * multiplier, rel=1e-9)
        assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]


@pytest.mark.usefixtures("every_probe")
def test_no_probe_between_probes():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, calibration_steps=3, probe_every_steps=5)
    runs, calls = {}, 0

    def closure():
        nonlocal calls
        calls += 1
        return loss_of(model)

    for step in range(1, 18):
        train_step(model, optimizer, loss_of)
        calls = 0
        scheduler.step(closure)
        if calls:
            runs[step] = calls
    assert runs.pop(1) > 10  # a search
    # Two candidates each; at step 5, where the parameters of six steps before are not known, none.
    assert runs == {2: 2, 3: 2, 10: 2, 15: 2}


def test_every_none_only_calibrates():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, calibration_steps=2, probe_every_steps=None)
    for _ in range(8):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    assert scheduler.last_probe.step == 2


# What always holds


@pytest.mark.parametrize("evaluator", ["inplace", "stacked", "auto"])
@pytest.mark.parametrize("raise_at", range(1, 6))
def test_a_raising_closure_loses_nothing(evaluator, raise_at):
    model, loss_of = problem("convnet")
    optimizer = sgd(model, momentum=0.9)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1, calibration_steps=0, evaluator=evaluator)
    train_step(model, optimizer, loss_of)
    before, lr, calls = everything(model, optimizer), optimizer.param_groups[0]["lr"], 0
    state, probe = scheduler.state_dict(), scheduler.last_probe

    def closure():
        nonlocal calls
        calls += 1
        if calls >= raise_at:
            raise ValueError("broken batch")
        return loss_of(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, RuntimeError), match="broken batch"):
            for _ in range(4):  # from the second on, each step is probed
                scheduler.step(closure)
                train_step(model, optimizer, loss_of)
                before = everything(model, optimizer)
                lr, state, probe = optimizer.param_groups[0]["lr"], scheduler.state_dict(), scheduler.last_probe
    assert_same(before, everything(model, optimizer))
    assert optimizer.param_groups[0]["lr"] == lr
    assert scheduler.last_probe is probe
    for key in ("level", "calibration", "snapshots"):
        assert str(scheduler.state_dict()[key]) == str(state[key])
    scheduler.step(lambda: loss_of(model))  # the same probe can be made again
    assert scheduler.last_probe.step == scheduler.last_epoch == state["snapshots"]["steps"]


@pytest.mark.parametrize("rule", [None, Rule()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_before_the_step_either_says_nothing(bad, rule):
    """As of a batch without labels. The rate was divided by 1.5 each time."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.5)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1, calibration_steps=0, rule=rule, evaluator="inplace")
    if rule is None:  # there is no earlier step to look along
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    for through_loss in (True, False, True, False, True, False):
        if through_loss:
            scheduler.loss(lambda: loss_of(model) * bad)
        train_step(model, optimizer, loss_of)
        scheduler.step(None if through_loss else lambda: loss_of(model) * bad)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert scheduler.last_probe.step == scheduler.last_epoch
        assert scheduler.last_probe.factor == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_where_the_loss_was_finite_before_the_step_a_shorter_one_is_wanted(bad):
    """The step went too far; the rate stays inside its limits."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.5)
    scheduler = AutoLR(
        optimizer,
        model,
        probe_every_steps=1,
        calibration_steps=0,
        rule=Rule(),
        lr_limits=(1e-3, 1e4),
        evaluator="inplace",
    )
    seen, factor = [], [1.0]
    for _ in range(20):
        optimizer.zero_grad()
        loss = scheduler.loss(lambda: loss_of(model) * factor[0])
        loss.backward()
        optimizer.step()
        factor[0] = bad
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the loss is another one, and the first probe tells
            scheduler.step()
        factor[0] = 1.0
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[:3] == pytest.approx([0.5 / 1.5, 0.5 / 1.5**2, 0.5 / 1.5**3])
    assert seen[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_not_probed(fused):
    """A real GradScaler, with an inf at steps 2 and 3 (of every step, with a window of two)."""
    model, loss_of = problem("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scheduler = AutoLR(
        optimizer, model, probe_every_steps=1, calibration_steps=0, rule=Rule(window_steps=2), evaluator="inplace"
    )
    history, calls = [parameters_of(model)], 0

    def closure():
        nonlocal calls
        calls += 1
        return loss_of(model)

    for step in range(1, 7):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if step in (2, 3):
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        before, lr, calls = scheduler.last_probe, optimizer.param_groups[0]["lr"], 0
        scheduler.step(closure)
        if step in (2, 3):
            assert (calls, scheduler.last_probe, optimizer.param_groups[0]["lr"]) == (0, before, lr)
            continue
        history.append(parameters_of(model))
        window = min(2, len(history) - 1)
        expected = losses_of_copies(model, history[-1 - window], FACTORS_2, loss_of)
        assert scheduler.last_probe.losses.tolist() == expected
    assert scheduler.last_epoch == 4


def test_accumulation_and_clipping():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.5)
    scheduler = AutoLR(
        optimizer, model, probe_every_steps=1, rule=Rule(window_steps=1), calibration_steps=0, evaluator="inplace"
    )
    probes = []
    for micro in range(1, 10):
        (loss_of(model) / 3).backward()
        previous = parameters_of(model)
        if micro % 3 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step(lambda: loss_of(model))
        if micro % 3 == 0:
            expected = losses_of_copies(model, previous, FACTORS_2, loss_of)
            assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-6)
        probes.append(scheduler.last_epoch)
    assert probes == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_several_calls_are_one():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1, calibration_steps=0)
    train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))
    assert scheduler.last_probe is None
    train_step(model, optimizer, loss_of)
    scheduler.step()  # a framework, blindly
    scheduler.step(lambda: loss_of(model))
    probe, lr = scheduler.last_probe, optimizer.param_groups[0]["lr"]
    assert probe.step == 2
    for _ in range(3):
        scheduler.step(lambda: loss_of(model))
        scheduler.step()
    assert scheduler.last_probe is probe
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (lr, 2)


def test_without_closure_it_anneals_and_says_once_how_to_probe():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=0.2)
    scheduler = AutoLR(optimizer, model, total_steps=10)
    with pytest.warns(UserWarning, match="no loss came through AutoLR.*scheduler.loss\\(lambda") as caught:
        for _ in range(10):
            train_step(model, optimizer, loss_of)
            scheduler.step()
    assert len(caught) == 1
    assert scheduler.last_probe is None
    assert scheduler.level[0] == 0.2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-12)


def test_a_call_missing_after_some_steps_is_told():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=2, calibration_steps=1)
    with pytest.warns(UserWarning, match="for this step.*at every step"):
        for step in range(1, 8):
            train_step(model, optimizer, loss_of)
            if step in (1, 7):
                scheduler.step(lambda: loss_of(model))
    assert scheduler.last_epoch == 7


@pytest.mark.filterwarnings("ignore:a probe was due")
@pytest.mark.parametrize(("calibration", "told_at"), [(0, 3), (1, 2), (3, 4)])
def test_a_closure_that_never_comes_is_refused_when_calibration_ends(calibration, told_at):
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, calibration_steps=calibration, probe_every_steps=2)
    for _ in range(told_at - 1):
        train_step(model, optimizer, loss_of)
        scheduler.step()
    train_step(model, optimizer, loss_of)
    with pytest.raises(ClosureError, match="no learning rate was searched for.*SequentialLR cannot hold"):
        scheduler.step()


@pytest.mark.parametrize(("until", "probed"), [(0.5, [6, 9]), (0.3, [6]), (0, []), (1, [6, 9, 12, 15, 18])])
def test_probes_end_and_annealing_goes_on(until, probed):
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(
        optimizer,
        model,
        probe_every_steps=3,
        probe_until_fraction=until,
        calibration_steps=0,
        total_steps=20,
    )
    seen, levels, rates = [], [], []
    for step in range(1, 21):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
        if scheduler.last_probe is not None and scheduler.last_probe.step == step:
            seen.append(step)
        levels.append(scheduler.level)
        rates.append(scheduler.get_last_lr()[0])
    assert seen == probed
    assert all(level == levels[-1] for level in levels[10:]) == (until <= 0.5)
    assert rates == pytest.approx(
        [level[0] * (1 + math.cos(math.pi * step / 20)) / 2 for step, level in enumerate(levels, start=1)],
        abs=1e-12,
    )


def test_a_loss_computed_before_is_told():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, evaluator="inplace")
    train_step(model, optimizer, loss_of)
    loss = loss_of(model).detach()
    with pytest.warns(UserWarning, match="a loss that was computed before: call the model inside") as caught:
        scheduler.step(lambda: loss)
    assert caught[0].filename == __file__


def test_a_state_between_a_new_group_and_the_next_step_is_whole():
    model, loss_of = problem("mlp")
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    scheduler = AutoLR(optimizer, model, calibration_steps=0, probe_every_steps=1)
    train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.02})
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    assert scheduler.get_last_lr()[1] == pytest.approx(0.02)


def test_past_total_steps_is_told():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, total_steps=3, calibration_steps=0)
    with pytest.warns(UserWarning, match="past total_steps=3"):
        for _ in range(5):
            train_step(model, optimizer, loss_of)
            scheduler.step(lambda: loss_of(model))


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("cut", range(1, 14))
def test_resumed_run_is_bit_for_bit_the_same(cut, tensor_lr):
    """Cut anywhere: in calibration, inside an open window (7 and 8 before the probe at 9), between probes."""

    def start():
        torch.manual_seed(3)
        model = convnet()
        lr = torch.tensor(0.01) if tensor_lr else 0.01
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        scheduler = AutoLR(
            optimizer,
            model,
            probe_every_steps=3,
            calibration_steps=4,
            rule=Rule(window_steps=(1, 3)),
            total_steps=14,
            evaluator="stacked",
        )
        return model, optimizer, scheduler

    def run(model, optimizer, scheduler, steps):
        rows = []
        for step in steps:
            generator = torch.Generator(torch.get_default_device()).manual_seed(step)
            x = torch.randn(8, 2, 4, 4, generator=generator)
            y = torch.randint(3, (8,), generator=generator)
            train_step(model, optimizer, lambda model, x=x, y=y: F.cross_entropy(model(x), y))
            scheduler.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
            rows.append((float(optimizer.param_groups[0]["lr"]), scheduler.last_probe))
        return rows

    whole = start()
    rows = run(*whole, range(14))

    first = start()
    run(*first, range(cut))
    file = io.BytesIO()
    random = torch.cuda if ON_GPU else torch  # where dropout draws from
    torch.save([*(part.state_dict() for part in first), random.get_rng_state()], file)
    file.seek(0)
    *states, rng = torch.load(file, weights_only=True)
    second = start()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    random.set_rng_state(rng)
    assert float(second[1].param_groups[0]["lr"]) == rows[cut - 1][0]
    resumed = run(*second, range(cut, 14))

    assert [lr for lr, _ in resumed] == [lr for lr, _ in rows[cut:]]
    assert_same(everything(*whole[:2])[:-1], everything(*second[:2])[:-1])
    for (_, probe), (_, expected) in zip(resumed, rows[cut:], strict=True):
        if probe is not None:
            assert torch.equal(probe.losses, expected.losses)


def test_resumed_after_a_probe_that_was_left_out_does_not_warn():
    """At step 2, where the parameters of three steps before are not known."""

    def start():
        model, loss_of = problem("mlp")
        optimizer = sgd(model)
        return (
            model,
            optimizer,
            AutoLR(optimizer, model, probe_every_steps=2, calibration_steps=0, evaluator="inplace"),
            loss_of,
        )

    model, optimizer, scheduler, loss_of = start()
    for _ in range(2):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    assert scheduler.last_probe is None
    state = scheduler.state_dict()
    model, optimizer, scheduler, loss_of = start()
    scheduler.load_state_dict(state)
    train_step(model, optimizer, loss_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step(lambda: loss_of(model))


def test_resumed_after_falling_back_does_not_choose_anew():
    def start():
        torch.manual_seed(0)
        model = Recurrent()
        optimizer = sgd(model)
        return model, optimizer, AutoLR(optimizer, model, probe_every_steps=1, rule=Rule(factors=FACTORS_5))

    x, y = torch.randn(6, 4, 5), torch.randint(3, (6,))
    model, optimizer, scheduler = start()
    train_step(model, optimizer, lambda model: F.cross_entropy(model(x), y))
    with pytest.warns(UserWarning, match="one after another"):
        scheduler.step(lambda: F.cross_entropy(model(x), y))
    state, chosen = scheduler.state_dict(), scheduler.evaluator.name
    model, optimizer, scheduler = start()
    assert scheduler.evaluator.name == "auto"
    scheduler.load_state_dict(state)
    assert scheduler.evaluator.name == chosen


@pytest.mark.parametrize("fastest", ["stacked", "streamed", "inplace"])
def test_a_choice_that_was_measured_goes_on(fastest, monkeypatch):
    def start():
        torch.manual_seed(0)
        model, loss_of = problem("mlp")
        optimizer = sgd(model)
        return model, optimizer, AutoLR(optimizer, model, rule=Rule(FACTORS_5)), loss_of

    monkeypatch.setattr(
        "autolr_fast._evaluators.auto.seconds", lambda run: 0.1 if run.func.__self__.name == fastest else 0.2
    )
    model, optimizer, scheduler, loss_of = start()
    train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))
    other, others_optimizer, resumed, _ = start()
    for part, state in ((other, model), (others_optimizer, optimizer), (resumed, scheduler)):
        part.load_state_dict(copy.deepcopy(state.state_dict()))
    assert resumed.evaluator.name == scheduler.evaluator.name == fastest
    for network, optim, schedule in ((model, optimizer, scheduler), (other, others_optimizer, resumed)):
        train_step(network, optim, loss_of)
        schedule.step(lambda network=network: loss_of(network))
    assert_same(everything(model, optimizer), everything(other, others_optimizer))


def test_a_state_from_before_the_choice_is_gone_back_to():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, rule=Rule(FACTORS_5))
    before = scheduler.state_dict()
    train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))
    assert scheduler.evaluator.name != "auto"
    scheduler.load_state_dict(before)
    assert scheduler.evaluator.name == "auto"


def test_a_state_is_of_its_moment():
    """What is kept of an open window goes with steps that are taken again, and a state does not."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=2, calibration_steps=0)
    for _ in range(3):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    state = scheduler.state_dict()
    ((start, values, _),) = state["snapshots"]["windows"]
    assert start == 1  # of the probe at 4, from where averages begin
    assert all(
        value is not kept for value, kept in zip(values, scheduler._snapshots._kept[1].values(), strict=True)
    )
    with pytest.raises(ValueError, match="shapes or dtypes differ"):
        model.double()
        scheduler.load_state_dict(state)


def test_state_dict_is_small_and_plain():
    model, loss_of = problem("convnet")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, evaluator="stacked")
    for _ in range(25):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    state = scheduler.state_dict()
    assert set(state) == {
        "version", "saved_by", "last_epoch", "tracker", "pace", "snapshots", "losses", "calibration", "level",
        "evaluator", "hooks", "state_weights", "calibration_steps", "history", "groups", "optimizers", "held_back",
    }  # fmt: skip
    # Besides, one copy of the parameters, from where averages begin.
    assert [start for start, *_ in state["snapshots"].pop("windows")] == [19]
    assert len(json.dumps(state)) < 10_000


def test_load_state_dict_refuses_what_is_not_its_own():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model)
    train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))
    before = scheduler.state_dict()

    with pytest.raises(TypeError, match="state_dict=None"):
        scheduler.load_state_dict(None)
    in_place = AutoLR(sgd(model), model, evaluator="inplace").state_dict()
    with pytest.raises(ValueError, match="of an evaluator with the state {'name'.*and 'inplace' has {}: give"):
        AutoLR(sgd(model), model, evaluator="inplace").load_state_dict(before)
    with pytest.raises(ValueError, match="of an evaluator with the state {}, and .* same evaluator"):
        scheduler.load_state_dict(in_place)
    with pytest.raises(ValueError, match="snapshot of 1 parameters and the optimizer 4"):
        scheduler.load_state_dict(
            {**before, "snapshots": {**before["snapshots"], "windows": [(0, [torch.ones(2)], [])]}}
        )
    assert str(scheduler.state_dict()) == str(before)
    with pytest.raises(
        ValueError, match=r"none of AutoLR, but of something else, .*it has 'lr'.*load the states of model"
    ):
        scheduler.load_state_dict({"lr": 1})
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    other = AutoLR(torch.optim.SGD(groups, lr=0.1), model)
    with pytest.raises(ValueError, match="of 2 param groups and the optimizer has 1"):
        scheduler.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"has 'level.guard', which is not known here.*version 2"):
        scheduler.load_state_dict({**before, "level": {**before["level"], "guard": {}}})
    with pytest.raises(ValueError, match="rule of AutoLR is another since version 2: no training goes on from it"):
        scheduler.load_state_dict({**before, "version": 1})
    with pytest.raises(
        ValueError, match=r"has 'later', .*saved by autolr_fast 9.0, version 7, and this is .* version 2"
    ):
        scheduler.load_state_dict({**before, "later": 1, "version": 7, "saved_by": "autolr_fast 9.0"})
    assert str(scheduler.state_dict()) == str(before)


# Param groups and parameters


def test_groups_keep_their_ratio():
    model, loss_of = problem("mlp")
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "lr": 0.003}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = AutoLR(optimizer, model, total_steps=30)
    for _ in range(25):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
        first, second = scheduler.get_last_lr()
        assert first / second == pytest.approx(100)
    assert first != pytest.approx(0.3)


@pytest.mark.parametrize("at", [3, 5, 6])
def test_group_added_while_training_keeps_its_ratio_without_calibration(at):
    """Also inside an open window: what was not there before it is held where it is."""
    model, loss_of = problem("mlp")
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    scheduler = AutoLR(optimizer, model, calibration_steps=0, probe_every_steps=6, rule=Rule(window_steps=2))
    for step in range(1, 14):
        if step == at:
            model[2].requires_grad_(True)
            optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.02})
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
        if step == at - 1:
            ratio = 0.02 / optimizer.param_groups[0]["lr"]
    assert len(scheduler.get_last_lr()) == 2
    assert scheduler.last_probe.step == 12
    assert scheduler.get_last_lr()[1] / scheduler.get_last_lr()[0] == pytest.approx(ratio)


def test_tensor_lr_is_filled():
    model, loss_of = problem("mlp")
    lr = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    held = optimizer.param_groups[0]["lr"]
    scheduler = AutoLR(optimizer, model, total_steps=10)
    seen = set()
    for _ in range(5):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
        assert optimizer.param_groups[0]["lr"] is held
        assert scheduler.get_last_lr()[0] is not held
        seen.add(held.item())
    assert len(seen) == 5


def test_tensor_and_float_lr_agree():
    levels = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        model, loss_of = problem("mlp")
        optimizer = sgd(model, lr=lr)
        scheduler = AutoLR(optimizer, model, total_steps=30)
        for _ in range(25):
            train_step(model, optimizer, loss_of)
            scheduler.step(lambda model=model, loss_of=loss_of: loss_of(model))
        levels.append(scheduler.level[0])
    assert levels[0] == pytest.approx(levels[1], rel=1e-3)


def test_parameters_without_gradients():
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(5, 3)})
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    optimizer = sgd(model, weight_decay=0.1)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1)
    before = model["unused"].weight.detach().clone()
    for _ in range(4):
        train_step(model, optimizer, lambda model: F.cross_entropy(model["used"](x), y))
        scheduler.step(lambda: F.cross_entropy(model["used"](x), y))
    assert scheduler.last_probe.step == 4
    assert torch.equal(model["unused"].weight, before)


@pytest.mark.parametrize("direction", ["step", "gradient"])
def test_sparse_gradients(direction):
    model = nn.Sequential(nn.Embedding(11, 3, sparse=True))
    x, y = torch.randint(11, (12, 4)), torch.randint(3, (12,))
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)

    def loss_of(model):
        return F.cross_entropy(model(x).mean(1), y)

    scheduler = AutoLR(
        optimizer,
        model,
        probe_every_steps=1,
        calibration_steps=0,
        rule=Rule(direction=direction),
        evaluator="inplace",
    )
    for _ in range(3):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    assert scheduler.last_probe.step == 3
    assert scheduler.last_probe.losses.isfinite().all()


def test_optimizer_that_takes_a_closure():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(
        optimizer, model, probe_every_steps=1, calibration_steps=0, rule=Rule(window_steps=1), evaluator="inplace"
    )

    def training_closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        previous = parameters_of(model)
        optimizer.step(training_closure)
        scheduler.step(lambda: loss_of(model))
        expected = losses_of_copies(model, previous, FACTORS_2, loss_of)
        assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_and_step():
    """Both windows, InPlace: the compiled forward and the compiled update see the candidates' values."""
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=torch.tensor(0.1))
    compiled = torch.compile(model, backend="eager")
    scheduler = AutoLR(
        optimizer,
        compiled,
        probe_every_steps=1,
        calibration_steps=0,
        rule=Rule(window_steps=1),
        evaluator="inplace",
    )
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        previous = parameters_of(model)
        optimizer.zero_grad()
        loss_of(compiled).backward()
        step()
        scheduler.step(lambda: loss_of(compiled))
        expected = losses_of_copies(model, previous, FACTORS_2, loss_of)
        assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_heat": math.inf}, ValueError, "max_heat=inf leaves nothing to move the level by: give a rule"),
        ({"rule": (2.0, 0.5)}, TypeError, r"rule=\(2.0, 0.5\): expected None, or a Rule such as Rule\(factors="),
        ({"probe_every_steps": 0}, ValueError, "probe_every_steps=0: expected 1 or more"),
        ({"calibration_steps": -1}, ValueError, "calibration_steps=-1"),
        ({"anneal": "plateau"}, ValueError, "anneal='plateau' is not known: use one of 'cosine', 'linear'"),
        ({"probe_until_fraction": 1.5}, ValueError, "probe_until_fraction=1.5"),
        ({"probe_until_fraction": math.nan}, ValueError, "probe_until_fraction=nan"),
        ({"probe_until_fraction": "half"}, TypeError, "probe_until_fraction='half'"),
        ({"total_steps": 0}, ValueError, "total_steps=0"),
        ({"total_steps": 1e3}, TypeError, "total_steps=1000.0"),
        ({"anneal": "exp"}, ValueError, "anneal='exp' is not known"),
        ({"lr_limits": (0, 1)}, ValueError, r"lr_limits=\(0, 1\): give the lowest and the highest"),
        ({"lr_limits": (2, 1)}, ValueError, r"lr_limits=\(2, 1\)"),
        ({"lr_limits": ("low", 1)}, ValueError, "lr_limits=\\('low', 1"),
        ({"lr_limits": 0.1}, ValueError, "lr_limits=0.1"),
        ({"lr_limits": (1e-12, math.inf)}, ValueError, "both finite"),
        ({"lr_limits": (1e-12, 0.01)}, ValueError, r"lr=0.1 of optimizer.param_groups\[0\] is outside"),
        (
            {"evaluator": "quick"},
            ValueError,
            "use one of 'auto', 'graphed', 'inplace', 'stacked', 'streamed'",
        ),
        ({"model": mlp()}, ValueError, "not a parameter of the model"),
        ({"model": None}, TypeError, "model=None: expected the nn.Module"),
        ({"optimizer": lambda: None}, TypeError, r"the closure goes to loss\(\)"),
    ],
)
def test_bad_arguments(arguments, error, says):
    model = mlp()
    arguments = {"optimizer": sgd(model), "model": model, **arguments}
    with pytest.raises(error, match=says):
        AutoLR(**arguments)


def test_maximizing_prefers_higher_values():
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=1e-4, maximize=True)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1)
    first = loss_of(model).item()
    for _ in range(20):
        train_step(model, optimizer, lambda model: -loss_of(model))
        scheduler.step(lambda: -loss_of(model))
    assert loss_of(model).item() < 0.7 * first
    groups = [{"params": model[0].parameters(), "maximize": True}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="maximize=True in some param groups only"):
        AutoLR(torch.optim.SGD(groups, lr=0.1), model)


def test_a_closure_that_draws_batches_is_refused():
    model, _ = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model)
    batches = iter([(torch.randn(12, 5), torch.randint(3, (12,))) for _ in range(9)])

    def closure():
        x, y = next(batches)
        return F.cross_entropy(model(x), y)

    closure().backward()
    optimizer.step()
    before = everything(model, optimizer)
    with pytest.raises(ClosureError, match="at the same weights.*take it outside"):
        scheduler.step(closure)
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("direction", ["step", "gradient"])
def test_a_closure_that_steps_the_optimizer_is_refused(direction):
    model, loss_of = problem("mlp")
    optimizer = sgd(model, momentum=0.9)
    scheduler = AutoLR(optimizer, model, rule=Rule(direction=direction))
    train_step(model, optimizer, loss_of)
    before = everything(model, optimizer)

    @torch.enable_grad()
    def closure():
        if direction == "step":
            train_step(model, optimizer, loss_of)
        else:
            optimizer.step()
        return loss_of(model)

    with pytest.raises(ClosureError, match=r"called optimizer.step\(\)"):
        scheduler.step(closure)
    assert_same(before, everything(model, optimizer))
    train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))  # no word of a closure that was missing
    assert scheduler.last_probe.step == 2


def test_it_is_not_copied_or_pickled():
    model = mlp()
    scheduler = AutoLR(sgd(model), model)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save scheduler.state_dict\(\)"):
            attempt(scheduler)


def test_an_annealing_that_goes_wrong_later_is_named():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(
        optimizer,
        model,
        total_steps=10,
        anneal=lambda done: math.nan if 0.5 < done < 1 else 1.0,
        calibration_steps=0,
    )
    with pytest.raises(ValueError, match="returned nan at 0.6"):
        for _ in range(10):
            train_step(model, optimizer, loss_of)
            scheduler.step(lambda: loss_of(model))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizers_that_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match="LBFGS.*without AutoLR"):
        AutoLR(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(ValueError, match="differentiable=False"):
        AutoLR(torch.optim.Adam(model.parameters(), differentiable=True), model)


@pytest.mark.parametrize("closure", [0.25, torch.tensor(0.25), 3])
def test_step_takes_no_metric_and_no_epoch(closure):
    model = mlp()
    with pytest.raises(TypeError, match="scheduler.loss\\(lambda"):
        AutoLR(sgd(model), model).step(closure)


def test_parameter_replaced_while_training():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1)
    model[2] = nn.Linear(16, 3)
    train_step(model, optimizer, loss_of)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="not a parameter of the model.*after anything that replaces them"):
        scheduler.step(lambda: loss_of(model))
    assert_same(before, everything(model, optimizer))


def test_model_converted_between_step_and_probe():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1, calibration_steps=0)
    for _ in range(2):
        scheduler.step(lambda: loss_of(model))
        train_step(model, optimizer, loss_of)
    model.double()
    with pytest.raises(RuntimeError, match="'0.weight' was .*float32.* and is .*float64"):
        scheduler.step(lambda: loss_of(model))


@pytest.mark.parametrize(
    ("closure_of", "says"),
    [(lambda loss: loss.backward() or loss, "called backward"), (lambda loss: loss.detach(), "a detached one")],
)
def test_closure_that_gives_no_gradient(closure_of, says):
    model, loss_of = problem("convnet")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1, calibration_steps=0, rule=Rule(direction="gradient"))
    train_step(model, optimizer, loss_of)
    before = everything(model, optimizer)
    with pytest.raises(ClosureError, match=says):
        scheduler.step(lambda: closure_of(loss_of(model)))
    assert_same(before, everything(model, optimizer))


def test_bad_closure_says_so_and_can_be_mended():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1, calibration_steps=0)
    for _ in range(2):
        scheduler.step(lambda: loss_of(model))
        train_step(model, optimizer, loss_of)
    with pytest.raises(ClosureError, match="returned None"):
        scheduler.step(lambda: None)
    scheduler.step(lambda: loss_of(model))
    assert scheduler.last_probe.step == 2


# What a person sees


def test_last_probe_is_readable():
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, probe_every_steps=1, calibration_steps=0, evaluator=InPlace())
    for _ in range(2):
        scheduler.step(lambda: loss_of(model))
        train_step(model, optimizer, loss_of)
    scheduler.step(lambda: loss_of(model))
    probe = scheduler.last_probe
    assert isinstance(probe, Probe)
    assert probe.lr_before == [0.1]
    assert probe.lr_after == scheduler.get_last_lr()
    assert probe.weights.sum().item() == pytest.approx(1)
    assert probe.factors == (2 / 3, 1.0)
    assert probe.weights.tolist() == [0.0, 1.0]  # the steps lowered the loss of their batch all the way
    assert probe.losses[1] < probe.losses[0]
    assert probe.factor.item() == pytest.approx(1.2)
    text = repr(probe)
    assert "step=2, window=1, evaluator='inplace', rounds=1" in text
    assert f"lr 0.1 -> {probe.lr_after[0]:.4g}" in text
    assert f"losses {{0.6667: {probe.losses[0].item():.4g} (0%), 1: {probe.losses[1].item():.4g} (100%)}}" in text


def test_repr_and_preset():
    model = mlp()
    assert repr(AutoLR(sgd(model), model)) == (
        "AutoLR(lr=[0.1], total_steps=None, probe_every_steps=10, calibration_steps=20, max_heat=0.3, rule=None, "
        "evaluator='auto')"
    )
    paper = repr(AutoLR.paper(sgd(model), model))
    assert "probe_every_steps=1, calibration_steps=0, max_heat=inf, rule=Rule(factors=(2.0, 1.0, 0.5), " in paper
    assert "probe_every_steps=4" in repr(AutoLR.paper(sgd(model), model, probe_every_steps=4))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (None, {6: 3, 9: 3, 12: 3}),
        (Rule(), dict.fromkeys((3, 6, 9, 12), 1)),
        (Rule(window_steps=(1, 2)), {3: 2, 6: 1, 9: 2, 12: 1}),
    ],
)
@pytest.mark.parametrize("build", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
def test_a_line_spans_the_same_steps_whatever_the_optimizer(build, rule, expected):
    """Those of a rule end now; those of the heat where the last step began, and as many as between probes."""
    model, loss_of = problem("mlp")
    optimizer = build(model.parameters(), lr=0.01)
    scheduler = AutoLR(optimizer, model, probe_every_steps=3, calibration_steps=0, evaluator="inplace", rule=rule)
    for _ in range(4 * 3):
        train_step(model, optimizer, loss_of)
        scheduler.step(partial(loss_of, model))
    assert {probe.step: probe.window for probe in scheduler.history} == expected


def test_it_is_a_scheduler_without_reference_cycles():
    model = mlp()
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert (scheduler.last_epoch, scheduler.base_lrs, scheduler.get_last_lr()) == (0, [0.1], [0.1])
    gone = weakref.ref(scheduler)
    gc.disable()
    try:
        del scheduler
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "make",
    [
        lambda model: AutoLR(sgd(model), model, process_group="gpu"),
        lambda model: ALRTree(model, torch.nn.functional.mse_loss, lr=[0.1, 1.0], process_group="gpu"),
    ],
)
def test_a_process_group_is_one(make):
    with pytest.raises(TypeError, match="process_group='gpu': expected a group as torch.distributed.new_group"):
        make(mlp())
