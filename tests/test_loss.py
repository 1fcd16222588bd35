"""What ``scheduler.loss`` keeps, for how long, and what it makes of all losses."""

import contextlib
import functools
import gc
import itertools
import json
import math
import statistics
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import FACTORS_3, AutoLR, ClosureError, Rule
from autolr_fast._isolation import isolation, replay
from autolr_fast._isolation.random_streams import RandomStreams
from autolr_fast._level.heat import Heat
from autolr_fast._steps import Losses

from .helpers import between, losses_of_copies, mlp, moved_by_heat, parameters_of, sgd

TWICE = "scheduler.loss was called twice before a step, and found no gradients"
PROBED = {1, 2, 3, 5, 10}  # of the first twelve steps, as below
OFTEN = {"calibration_steps": 3, "probe_every_steps": 5, "rule": Rule(FACTORS_3, window_steps=1)}
ALWAYS = {**OFTEN, "calibration_steps": 0, "probe_every_steps": 1}


def start(lr=0.05, maximize=False, evaluator="inplace", **options):
    model = mlp()
    optimizer = sgd(model, lr=lr, maximize=maximize)
    return model, optimizer, AutoLR(optimizer, model, evaluator=evaluator, **options)


def batch():
    return torch.randn(12, 5), torch.randint(3, (12,))


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def closure_of(model, x, y):
    return lambda: loss_of(model, x, y)


@pytest.fixture
def no_garbage_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize(
    ("which", "evaluator"),
    [*itertools.product(["last", "all"], ["auto", "inplace", "streamed", "stacked"]), ("last", "graphed")],
)
@pytest.mark.usefixtures("every_probe")
def test_no_batch_outlives_its_step(which, evaluator):
    model, optimizer, scheduler = start(evaluator=evaluator, micro_batches=which, **OFTEN)
    probed = set()
    for step in range(1, 13):
        optimizer.zero_grad()
        kept = []
        for _ in range(2):
            x, y = batch()
            kept += [weakref.ref(x), weakref.ref(y)]
            loss = scheduler.loss(closure_of(model, x, y))
            loss.backward()
            del x, y, loss
        alive = [ref() is not None for ref in kept]
        assert alive == [step in PROBED and which == "all"] * 2 + [step in PROBED] * 2
        optimizer.step()
        scheduler.step()
        assert not any(ref() is not None for ref in kept)
        probed |= {scheduler.last_probe.step}
    assert probed == PROBED


def test_random_states_are_read_for_probes_alone(monkeypatch):
    made = []

    class Counted(RandomStreams):
        def __init__(self):
            made.append(1)
            super().__init__()

    monkeypatch.setattr(replay, "RandomStreams", Counted)
    monkeypatch.setattr(isolation, "RandomStreams", Counted)
    model, optimizer, scheduler = start(**OFTEN)
    read = set()
    for step in range(1, 13):
        x, y = batch()
        made.clear()
        optimizer.zero_grad()
        scheduler.loss(lambda x=x, y=y: loss_of(model, x, y)).backward()
        optimizer.step()
        scheduler.step()
        if made:
            read.add(step)
    assert read == PROBED


# What goes wrong between a loss and its step


class BrokenError(Exception):
    pass


def raises():
    raise BrokenError


def train(model, optimizer, scheduler):
    """One step that nothing happens in; return its batch."""
    x, y = batch()
    optimizer.zero_grad()
    scheduler.loss(lambda: loss_of(model, x, y)).backward()
    optimizer.step()
    scheduler.step()
    return x, y


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_batch_that_raises_is_no_part_of_the_step(broken, which):
    """Nor is it kept: of three calls one raises, and the loop goes on with the others."""
    model, optimizer, scheduler = start(micro_batches=which, **ALWAYS)
    train(model, optimizer, scheduler)
    prev, batches = parameters_of(model), [batch() for _ in range(3)]
    ref = weakref.ref(batches[broken][0])

    def closure(number, x, y):
        loss = loss_of(model, x, y)
        if number == broken:
            raise BrokenError
        return loss

    for number, (x, y) in enumerate(batches):
        with contextlib.suppress(BrokenError):
            scheduler.loss(functools.partial(closure, number, x, y)).backward()
    del batches[broken], x, y
    assert ref() is None
    optimizer.step()
    scheduler.step()
    if (broken, which) == (2, "last"):  # what would have been judged is gone
        assert scheduler.last_probe.step == 1
        with pytest.warns(match="no loss came through AutoLR for this step"):
            train(model, optimizer, scheduler)
        return
    judged = batches if which == "all" else batches[-1:]
    losses = [losses_of_copies(model, prev, FACTORS_3, lambda m, pair=pair: loss_of(m, *pair)) for pair in judged]
    expected = [statistics.fmean(parts) for parts in zip(*losses, strict=True)]
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("call", [AutoLR.loss, AutoLR.remember])
def test_a_loss_that_no_step_follows_is_that_of_the_next(call):
    """As where a loop leaves a batch out after it saw its loss."""
    model, optimizer, scheduler = start(**ALWAYS)
    train(model, optimizer, scheduler)
    prev, (x, y), (other, others) = parameters_of(model), batch(), batch()
    call(scheduler, lambda: loss_of(model, other, others))
    optimizer.zero_grad()
    with pytest.warns(match=TWICE):
        call(scheduler, lambda: loss_of(model, x, y))
    loss_of(model, x, y).backward()
    optimizer.step()
    scheduler.step()
    expected = losses_of_copies(model, prev, FACTORS_3, lambda model: loss_of(model, x, y))
    assert scheduler.last_probe.losses.tolist() == expected


@pytest.mark.parametrize("which", ["last", "all"])
def test_losses_of_a_step_that_was_not_followed_up_are_not_those_of_the_next(which):
    """As where a loop leaves ``scheduler.step`` out."""
    model, optimizer, scheduler = start(micro_batches=which, **ALWAYS)
    train(model, optimizer, scheduler)
    scheduler.loss(closure_of(model, *batch())).backward()
    optimizer.step()
    prev = parameters_of(model)
    with pytest.warns(match="a probe was due"):
        x, y = train(model, optimizer, scheduler)
    expected = losses_of_copies(model, prev, FACTORS_3, lambda model: loss_of(model, x, y))
    assert [probe.step for probe in scheduler.history] == [1, 3]
    assert scheduler.last_probe.losses.tolist() == expected


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_not_judged_and_keeps_nothing(fused):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", **ALWAYS)
    seen = []
    for step in range(1, 7):
        x, y = batch()
        ref, before = weakref.ref(x), parameters_of(model)
        optimizer.zero_grad()
        scaler.scale(scheduler.loss(lambda x=x, y=y: loss_of(model, x, y))).backward()
        if step in (1, 3, 4):
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        probe = scheduler.last_probe
        scheduler.step()
        if step in (1, 3, 4):
            assert scheduler.last_probe is probe
        else:
            expected = losses_of_copies(model, before, FACTORS_3, lambda model, x=x, y=y: loss_of(model, x, y))
            assert scheduler.last_probe.losses.tolist() == expected
            seen.append(scheduler.last_probe.step)
        del x, y
        assert ref() is None
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("to_none", [True, False])
def test_micro_batches_stay_where_an_iteration_ends_after_each(to_none):
    """As in Accelerate's loop: scheduler.step() after each micro-batch. A batch that is skipped goes, untold."""
    model, optimizer, scheduler = start(micro_batches="all", **ALWAYS)
    for step in range(1, 5):
        batches, prev = [batch() for _ in range(3)], parameters_of(model)
        for part, (x, y) in enumerate(batches, start=1):
            scheduler.loss(lambda x=x, y=y: loss_of(model, x, y)).backward()
            if part == 3:
                optimizer.step()
            scheduler.step()
        losses = [
            losses_of_copies(model, prev, FACTORS_3, lambda m, pair=pair: loss_of(m, *pair)) for pair in batches
        ]
        expected = [statistics.fmean(parts) for parts in zip(*losses, strict=True)]
        assert scheduler.last_probe.step == step
        assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-6)
        optimizer.zero_grad(set_to_none=to_none)
        scheduler.loss(closure_of(model, *batch())).backward()
        scheduler.step()  # and no optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)


# Two calls without a backward


@pytest.mark.parametrize("which", ["last", "all"])
def test_two_terms_of_a_loss_are_told_once_and_the_second_is_judged(which):
    model, optimizer, scheduler = start(micro_batches=which, **ALWAYS)
    with pytest.warns(match=TWICE) as caught:
        for _ in range(3):
            (x, y), (other, others), prev = batch(), batch(), parameters_of(model)
            optimizer.zero_grad()
            first = scheduler.loss(closure_of(model, x, y))
            second = scheduler.loss(closure_of(model, other, others))
            (first + second).backward()
            optimizer.step()
            scheduler.step()
            expected = losses_of_copies(model, prev, FACTORS_3, lambda m, x=other, y=others: loss_of(m, x, y))
            assert scheduler.last_probe.losses.tolist() == expected
    assert [each.filename for each in caught] == [__file__]
    assert "Return the sum of all terms of a loss from one closure" in str(caught[0].message)


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize("call", [AutoLR.loss, AutoLR.remember])
@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("goes_backward", [False, True])
def test_batches_that_a_loop_leaves_out_do_not_pile_up(goes_backward, which, call):
    """By ``continue``, before or after ``backward``: each goes with the next one, and the last is judged."""
    model, optimizer, scheduler = start(micro_batches=which, **ALWAYS)
    train(model, optimizer, scheduler)
    refs, prev = [], parameters_of(model)
    with pytest.warns(match=TWICE) as caught:
        for number in range(5):
            x, y = batch()
            refs.append(weakref.ref(x))
            optimizer.zero_grad()
            call(scheduler, closure_of(model, x, y))
            assert [ref() is not None for ref in refs] == [False] * number + [True]
            if goes_backward:
                loss_of(model, x, y).backward()
    assert len(caught) == 1
    loss_of(model, x, y).backward()
    optimizer.step()
    scheduler.step()
    expected = losses_of_copies(model, prev, FACTORS_3, lambda model: loss_of(model, x, y))
    assert scheduler.last_probe.losses.tolist() == expected


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("which", ["last", "all"])
def test_micro_batches_and_a_closure_that_raised_are_not_told(which, set_to_none):
    """Also the first batch of a training, of which there is no gradient yet; a warning is an error here."""
    model, optimizer, scheduler = start(micro_batches=which, **ALWAYS)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        for _ in range(2):
            with pytest.raises(BrokenError):
                scheduler.loss(raises)
        for _ in range(3):
            scheduler.loss(closure_of(model, *batch())).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.last_probe.step == 3


def test_steps_that_are_not_probed_tell_nothing():
    """There no closure is remembered."""
    model, optimizer, scheduler = start(**{**ALWAYS, "probe_every_steps": 5})
    for _ in range(4):
        optimizer.zero_grad()
        for _ in range(2):
            loss = scheduler.loss(closure_of(model, *batch()))
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert not scheduler.history


# What is refused


@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_refused_and_keeps_nothing(switch, which):
    model, optimizer, scheduler = start(micro_batches=which, **ALWAYS)
    x, y = batch()
    refused = weakref.ref(x)
    with switch(), pytest.raises(ClosureError, match="gradients are off: call it with gradients on; to evaluate"):
        scheduler.loss(lambda x=x: loss_of(model, x, y))
    del x
    assert refused() is None
    prev = parameters_of(model)
    x, y = train(model, optimizer, scheduler)
    expected = losses_of_copies(model, prev, FACTORS_3, lambda model: loss_of(model, x, y))
    assert scheduler.last_probe.losses.tolist() == expected


@pytest.mark.parametrize("closure", [0.25, None, torch.tensor(0.25)])
@pytest.mark.parametrize("call", [AutoLR.loss, AutoLR.remember])
def test_a_loss_is_no_closure(call, closure):
    _, _, scheduler = start()
    with pytest.raises(
        TypeError, match=r"closure=.*expected a callable that returns the loss, as in scheduler.loss"
    ):
        call(scheduler, closure)


@pytest.mark.parametrize(
    ("closure_of", "says"),
    [
        (lambda loss: None, r"returned None \(NoneType\), not a loss tensor"),
        (lambda loss: loss.item(), r"\(float\), not a loss tensor.*without .item\(\)"),
        (lambda loss: loss.expand(12), r"a tensor of shape \[12\], not a scalar"),
        (lambda loss: loss.long(), "a torch.int64 tensor: a loss is a real"),
    ],
)
@pytest.mark.parametrize("step", [2, 4])  # that is judged, and that is not
def test_what_is_no_loss_is_told_before_backward(step, closure_of, says):
    """The batch that follows in its place is the step's."""
    model, optimizer, scheduler = start(**{**OFTEN, "calibration_steps": 0, "probe_every_steps": 2})
    for _ in range(step - 1):
        train(model, optimizer, scheduler)
    x, y = batch()
    with pytest.raises(ClosureError, match=says):
        scheduler.loss(lambda: closure_of(loss_of(model, x, y)))
    x, y = train(model, optimizer, scheduler)
    assert scheduler.last_probe.step == step


def test_a_loss_of_one_element_is_a_scalar():
    model, optimizer, scheduler = start(**ALWAYS)
    x, y = batch()
    loss = scheduler.loss(lambda: loss_of(model, x, y).reshape(1, 1))
    assert loss.shape == (1, 1)
    loss.backward()
    optimizer.step()
    scheduler.step()
    assert scheduler.last_probe.losses.shape == (3,)


def test_probes_that_were_given_no_loss_are_told():
    model, optimizer, scheduler = start(**ALWAYS)
    train(model, optimizer, scheduler)
    loss_of(model, *batch()).backward()
    optimizer.step()
    scheduler.step()
    with pytest.warns(match=r"a probe was due.*`loss = scheduler.loss\(lambda") as caught:
        train(model, optimizer, scheduler)
    assert [each.filename for each in caught] == [__file__]
    assert [probe.step for probe in scheduler.history] == [1, 3]


# What becomes of all losses


@pytest.fixture
def held(monkeypatch):
    """The losses that the gain is made of."""
    losses, add = [], Heat.add_loss

    def spy(self, loss, step):
        losses.append(loss.item())
        add(self, loss, step)

    monkeypatch.setattr(Heat, "add_loss", spy)
    return losses


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("calibration", [0, 1])
def test_the_gain_is_of_the_mean_of_all_losses_since_the_last_probe(calibration, micro_batches, maximize, held):
    """Those that are not finite count for nothing; that of the first search is of a network that has not begun."""
    model, optimizer, scheduler = start(
        0.01, maximize, **{**OFTEN, "calibration_steps": calibration, "probe_every_steps": 4}
    )
    sign = -1 if maximize else 1
    seen, expected = [], []
    for step in range(1, 14):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            x, y = batch()
            scale = math.nan if (step, micro) in ((6, 0), (9, 0)) else sign
            loss = scheduler.loss(lambda x=x, y=y, scale=scale: scale * loss_of(model, x, y))
            seen.append(loss.item())
            (sign * loss_of(model, x, y)).backward()
        optimizer.step()
        scheduler.step()
        if scheduler.last_probe is not None and scheduler.last_probe.step == step:
            if not (calibration and step == 1):
                expected.append(sign * statistics.fmean(filter(math.isfinite, seen)))
            seen = []
    assert len(expected) == 3
    assert held == pytest.approx(expected, rel=1e-12)


class Elsewhere(torch.Tensor):
    """As on an accelerator: no tensor of the CPU, and none that is read back."""

    is_cpu = False

    def item(self):
        raise AssertionError

    tolist = __float__ = __bool__ = item


SEEN = {
    "some": [3.0, -1.0, 0.25, 7.5],
    "two": [1.5, 1.25],
    "one": [2.5],
    "not all finite": [math.nan, 3.0, math.inf, 2.0, -math.inf, 4.5],
    "one finite": [math.nan, 3.0],
    "none finite": [math.nan, math.inf],
    "alike": [0.5] * 7,
    "many": [math.sin(number) + 2 for number in range(200)],
    "far from zero": [1e4 + math.sin(number) for number in range(100)],
}


@pytest.mark.parametrize("own", [None, 2.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("case", sorted(SEEN))
def test_the_mean_is_torchs(case, elsewhere, dtype, own):
    """Of the finite ones, since the last were forgotten; not a number where there is none."""
    losses = Losses(mlp(), "last")
    for _ in range(2):
        assert losses.seen(None) is None
        given = torch.tensor(SEEN[case], dtype=dtype)
        for loss in given.as_subclass(Elsewhere) if elsewhere else given:
            losses.add(loss)
        seen = losses.seen(None if own is None else torch.tensor(own, dtype=torch.float64))
        if seen is None:
            assert (case, own, elsewhere) == ("none finite", None, False)
            continue
        assert isinstance(seen, Elsewhere) == elsewhere
        seen = seen.as_subclass(torch.Tensor)
        assert seen.dtype == torch.float64
        finite = given[given.isfinite()].double()
        expected = torch.stack([finite.mean(), torch.tensor(math.nan if own is None else own)])
        rounding = torch.finfo(torch.float64).eps * finite.square().sum().item()
        torch.testing.assert_close(seen, expected.double(), rtol=1e-9, atol=rounding, equal_nan=True)
        losses.forget()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_losses_go_on_from_their_state(elsewhere):
    whole, resumed = Losses(mlp(), "last"), Losses(mlp(), "last")
    given = torch.tensor(SEEN["not all finite"] + SEEN["some"])
    given = given.as_subclass(type("Somewhere", (torch.Tensor,), {"is_cpu": False})) if elsewhere else given
    for loss in given[:5]:
        whole.add(loss)
    resumed.load(json.loads(json.dumps(whole.state())))
    for loss in given[5:]:
        whole.add(loss)
        resumed.add(loss)
    torch.testing.assert_close(resumed.seen(None), whole.seen(None), rtol=0, atol=0, equal_nan=True)
    assert resumed.state() == whole.state()


@pytest.mark.parametrize("which", ["last", "all"])
def test_the_own_loss_is_that_of_what_is_run_again(which):
    """Of the last or the mean of all micro-batches; unknown where one was only remembered."""
    losses = Losses(mlp(), which)
    for step, remembered in enumerate((None, 0, 2), 1):
        for number, loss in enumerate((4.0, 7.0, 2.5)):
            losses.remember(lambda: None, step)
            if number != remembered:
                losses.add(torch.tensor(loss))
        _, own = losses.take(step, ())
        if remembered == 2 or (remembered == 0 and which == "all"):
            assert own is None
        else:
            assert own.item() == (2.5 if which == "last" else 4.5)
    losses.remember(lambda: None, 4)
    losses.add(torch.tensor(4.0))
    assert losses.has(4)
    assert not losses.has(5)
    assert losses.take(5, ()) == (None, None)
    assert not losses.has(4)


def test_of_losses_that_are_all_not_finite_there_is_no_mean(held):
    """A candidate's loss stands in."""
    model, optimizer, scheduler = start(**ALWAYS)
    x, y = batch()
    scheduler.loss(lambda: loss_of(model, x, y) * math.nan)
    loss_of(model, x, y).backward()
    optimizer.step()
    scheduler.step(lambda: loss_of(model, x, y))
    assert held == [scheduler.last_probe.losses[FACTORS_3.index(1.0)].item()]


def test_with_a_closure_for_step_alone_the_candidate_that_was_taken_is_judged(held):
    model, optimizer, scheduler = start(**ALWAYS)
    expected = []
    for _ in range(4):
        x, y = batch()
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        expected.append(loss_of(model, x, y).item())
        scheduler.step(lambda x=x, y=y: loss_of(model, x, y))
    assert held == expected


def test_a_loss_changed_in_place_was_seen_before(held):
    """As by ``loss /= 4``, where gradients are accumulated."""
    model, optimizer, scheduler = start(**ALWAYS)
    expected = []
    for _ in range(3):
        x, y = batch()
        optimizer.zero_grad()
        loss = scheduler.loss(lambda x=x, y=y: loss_of(model, x, y))
        expected.append(loss.item())
        loss /= 4
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert held == expected


def test_where_a_step_began_is_not_changed_with_the_loss():
    """A quarter of it would be below all that the search can find."""
    model, optimizer, scheduler = start()
    x, y = batch()
    loss = scheduler.loss(lambda: loss_of(model, x, y))
    loss /= 4
    loss.backward()
    optimizer.step()
    scheduler.step()
    assert scheduler.last_probe.retaken is not None


@pytest.mark.parametrize("lr0", [1e-3, 0.9])
@pytest.mark.parametrize("own", [False, True])
def test_a_first_step_after_which_no_scale_is_as_good_as_before_is_undone_and_told(own, lr0):
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(3.0, dtype=torch.float64))})
    optimizer = sgd(model, lr=lr0)
    scheduler = AutoLR(optimizer, model, evaluator="inplace")

    def closure():
        return model["w"].square() / 2 + 9 * (model["w"] != 3).double()

    loss = scheduler.loss(closure) if own else closure()
    loss.backward()
    optimizer.step()
    with pytest.warns(match="could not calibrate: no scale of the step clearly lowers the loss.* is undone"):
        scheduler.step(None if own else closure)
    assert model["w"].item() == 3
    assert scheduler.last_probe.retaken == 0
    assert optimizer.param_groups[0]["lr"] == lr0


def test_a_first_step_straight_uphill_is_undone_and_told():
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(3.0, dtype=torch.float64))})
    optimizer = sgd(model, lr=1e-3)
    scheduler = AutoLR(optimizer, model)
    (-scheduler.loss(lambda: model["w"].square() / 2)).backward()
    optimizer.step()
    with pytest.warns(match="could not calibrate: no scale of the step clearly lowers the loss.* is undone"):
        scheduler.step()
    assert model["w"].item() == 3
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_model_may_be_one_parameter():
    """The whole of it by hand: f(w) = w^2 / 2 from 3, at rates of which 1 is best."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(3.0, dtype=torch.float64))})
    optimizer = sgd(model, lr=0.5)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", **ALWAYS)
    scheduler.loss(lambda: model["w"].square() / 2).backward()
    optimizer.step()
    scheduler.step()
    expected = [(3 - factor * 1.5) ** 2 / 2 for factor in FACTORS_3]
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("through_loss", [True, False])
def test_the_loss_before_the_step_is_evaluated_only_where_training_did_not(through_loss, maximize):
    model, optimizer, scheduler = start(maximize=maximize, calibration_steps=0, probe_every_steps=1)
    sign, calls, history, heats = -1 if maximize else 1, [], [], [math.nan] * 5
    base, labels = batch()
    for step in range(1, 9):
        x = base + 0.01 * torch.randn_like(base)  # another batch each time, on which the loss falls all the same
        history.append(parameters_of(model))

        def loss(model, x=x):
            return sign * loss_of(model, x, labels)

        def closure(loss=loss):
            calls.append(1)
            return loss(model)

        optimizer.zero_grad()
        (scheduler.loss(closure) if through_loss else closure()).backward()
        optimizer.step()
        calls.clear()
        level = scheduler.level[0]
        scheduler.step(*(() if through_loss else (closure,)))
        if step == 1:  # there is no earlier step to look along
            assert (scheduler.last_probe, calls) == (None, [])
            continue
        probe, (older, newer) = scheduler.last_probe, history[-2:]
        assert (probe.step, probe.window, probe.factors) == (step, 1, (2 / 3, 1.0))
        mixed = {name: between(older[name], newer[name], 2 / 3) for name in newer}
        expected = [losses_of_copies(model, prev, (0.0,), loss)[0] for prev in (mixed, newer)]
        assert probe.losses.tolist() == expected
        costs = [sign * each for each in expected]
        assert probe.weights.tolist() == [costs[0] < costs[1], costs[0] > costs[1]]
        heats = [*heats[1:], costs[1] - costs[0]]
        state = scheduler.state_dict()["level"]["heat"]
        moved = moved_by_heat(1.2, heats, state, limit=0.2)
        assert scheduler.level[0] / level == pytest.approx(moved)
        assert probe.factor.item() == pytest.approx(moved)
        heats = [each * moved if each > 0 else each for each in heats]
        if step > 2:  # the first checks the closure
            assert len(calls) == (1 if through_loss else 2)


@pytest.mark.parametrize("which", ["last", "all"])
def test_a_batch_that_was_given_up_does_not_judge_a_later_step(which):
    """Its own step was skipped, and the loss of the next one does not come through AutoLR."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(8, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = AutoLR.paper(optimizer, model, micro_batches=which)
    scheduler.loss(lambda: model(x).square().mean()).backward()
    scheduler.step()
    model(-x).square().mean().backward()
    optimizer.step()
    scheduler.step()
    assert not scheduler.history
