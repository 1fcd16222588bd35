"""A probe sees the batch and the noise of the step that it judges, and leaves the random streams to training."""

import contextlib
import math
import random
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import FACTORS_5, AutoLR, ClosureError, Rule
from autolr_fast._evaluators import EvaluatorError

from .helpers import (
    ON_GPU,
    assert_same,
    convnet,
    everything,
    from_states,
    losses_of_copies,
    parameters_of,
    random_states,
    sgd,
)

EVALUATORS = ("inplace", "streamed", "stacked", "graphed")
CHANGED = "at the same parameters: probes are not judged by the loss of the step"


def of_dropout(model, x, y):
    return F.cross_entropy(model(x), y)


def drawn_before(model, x, y):
    return F.cross_entropy(model(x + torch.randn_like(x)), y)


def drawn_after(model, x, y):
    scores = model(x)
    return (scores + scores.detach() * torch.randn(len(y), 3)).square().mean()


def by_python(model, x, y):
    return F.cross_entropy(model(x) * (1 + random.random()), y)


def by_numpy(model, x, y):
    return F.cross_entropy(model(x) * (1 + float(numpy.random.random())), y)


NOISES = {
    "dropout": (0.3, of_dropout),
    "drawn before": (0.0, drawn_before),
    "drawn after": (0.0, drawn_after),
    "python": (0.0, by_python),
    "numpy": (0.0, by_numpy),
    "all": (0.3, lambda *batch: drawn_before(*batch) + drawn_after(*batch) + by_python(*batch) + by_numpy(*batch)),
}


EACH_STEP = {"calibration_steps": 0, "probe_every_steps": 1, "rule": Rule(FACTORS_5, window_steps=1)}


def batch():
    return torch.randn(12, 2, 4, 4), torch.randint(3, (12,))


def start(dropout, evaluator="inplace", **options):
    random.seed(0)
    numpy.random.seed(0)
    model = convnet(dropout)
    optimizer = sgd(model, lr=0.05, momentum=0.9)
    return model, optimizer, AutoLR(optimizer, model, evaluator=evaluator, **{**EACH_STEP, **options})


def draw():
    """Numbers from all streams."""
    return torch.rand(1).item(), random.random(), numpy.random.random()


def step_unnoticed(model, optimizer, scheduler):
    """Of a probe nothing is left but the rate, also in the random streams."""
    before, left = everything(model, optimizer), random_states()
    scheduler.step()
    assert_same(before, everything(model, optimizer))
    assert str(random_states()) == str(left)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("noise", sorted(NOISES))
def test_candidates_see_the_noise_of_the_step(noise, evaluator):
    """At the second probe, to which no check of the first belongs."""
    dropout, loss_of = NOISES[noise]
    model, optimizer, scheduler = start(dropout, evaluator)
    for _ in range(2):
        x, y = batch()
        optimizer.zero_grad()
        states, prev = random_states(), parameters_of(model)
        scheduler.loss(lambda x=x, y=y: loss_of(model, x, y)).backward()
        draw()
        optimizer.step()
        step_unnoticed(model, optimizer, scheduler)
    of_batch = lambda model: loss_of(model, x, y)  # noqa: E731
    expected = losses_of_copies(model, prev, FACTORS_5, from_states(states, of_batch))
    exact = evaluator == "stacked" or (ON_GPU and evaluator == "graphed")
    losses = scheduler.last_probe.losses.tolist()
    assert losses == (pytest.approx(expected, rel=1e-5) if exact else expected)
    others = losses_of_copies(model, prev, FACTORS_5, of_batch)
    assert losses != pytest.approx(others, rel=1e-3)  # as without replay


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_training_draws_what_it_draws_without_probes(evaluator):
    """Also while the first step is searched, and steps are taken again."""
    dropout, loss_of = NOISES["all"]
    drawn = []
    for probes in (False, True):
        torch.manual_seed(0)
        model, optimizer, scheduler = start(dropout, evaluator, calibration_steps=3)
        numbers = []
        for _ in range(6):
            x, y = batch()
            optimizer.zero_grad()
            closure = lambda model=model, x=x, y=y: loss_of(model, x, y)  # noqa: E731
            (scheduler.loss(closure) if probes else closure()).backward()
            numbers.append(draw())
            optimizer.step()
            if probes:
                scheduler.step()
                assert scheduler.last_probe.step == scheduler.last_epoch
            numbers.append(draw())
        drawn.append(numbers)
    assert drawn[0] == drawn[1]


def test_a_gradient_is_taken_with_the_noise_of_the_step():
    """``now - factor * lr * gradient``, by hand."""
    dropout, loss_of = NOISES["all"]
    model, optimizer, scheduler = start(dropout, rule=Rule(FACTORS_5, direction="gradient"))
    (x, y), states, lr = batch(), random_states(), optimizer.param_groups[0]["lr"]
    scheduler.loss(lambda: loss_of(model, x, y)).backward()
    optimizer.step()
    scheduler.step()
    of_step = from_states(states, lambda model: loss_of(model, x, y))
    gradients = torch.autograd.grad(of_step(model), list(model.parameters()))
    expected = []
    for factor in FACTORS_5:
        moved = {
            name: p - factor * lr * g for (name, p), g in zip(parameters_of(model).items(), gradients, strict=True)
        }
        expected += losses_of_copies(model, moved, [0.0], of_step)
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_line_over_several_steps_is_judged_by_the_last_ones_noise():
    dropout, loss_of = NOISES["all"]
    model, optimizer, scheduler = start(dropout, probe_every_steps=3, rule=Rule(FACTORS_5, window_steps=3))
    for step in range(3):
        x, y = batch()
        states = random_states()
        if step == 0:
            prev = parameters_of(model)
        optimizer.zero_grad()
        scheduler.loss(lambda x=x, y=y: loss_of(model, x, y)).backward()
        optimizer.step()
        scheduler.step()
    of_step = from_states(states, lambda model: loss_of(model, x, y))
    assert scheduler.last_probe.window == 3
    assert scheduler.last_probe.losses.tolist() == losses_of_copies(model, prev, FACTORS_5, of_step)


def test_a_closure_given_to_step_is_judged_as_it_draws_then():
    """All candidates see one noise; that of the step is not replayed."""
    dropout, loss_of = NOISES["all"]
    model, optimizer, scheduler = start(dropout)
    (x, y), prev = batch(), parameters_of(model)
    scheduler.loss(lambda: loss_of(model, x, y)).backward()
    optimizer.step()
    x, y = batch()
    expected = losses_of_copies(model, prev, FACTORS_5, from_states(random_states(), lambda m: loss_of(m, x, y)))
    scheduler.step(lambda: loss_of(model, x, y))
    assert scheduler.last_probe.losses.tolist() == expected


MODES = {
    "evaluation between": (lambda model: model.train(), lambda model: model.eval()),
    "eval at the loss": (lambda model: model.eval(), lambda model: model.train()),
    "some of it in eval": (lambda model: model[1].eval(), lambda model: model.train()),
}


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("case", sorted(MODES))
def test_modes_are_those_of_the_step(case, evaluator):
    """Whatever the modes are at ``step``, where they stay."""
    at_loss, at_step = MODES[case]
    model, optimizer, scheduler = start(0.3, evaluator)
    prev, (x, y) = parameters_of(model), batch()
    at_loss(model)
    states = random_states()
    modes = [module.training for module in model.modules()]
    scheduler.loss(lambda: of_dropout(model, x, y)).backward()
    at_step(model)
    draw()
    model(x)  # evaluation
    optimizer.step()
    left = [module.training for module in model.modules()]
    with pytest.warns(match=CHANGED) if case == "eval at the loss" else contextlib.nullcontext():
        scheduler.step()  # the evaluation changed the statistics that the loss was computed with
    assert [module.training for module in model.modules()] == left != modes

    def of_step(copy):
        for module, mode in zip(copy.modules(), modes, strict=True):
            module.training = mode
        return of_dropout(copy, x, y)

    expected = losses_of_copies(model, prev, FACTORS_5, from_states(states, of_step))
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert scheduler.last_probe.losses.tolist() != pytest.approx(
        losses_of_copies(model, prev, FACTORS_5, from_states(states, lambda copy: of_dropout(copy, x, y))), rel=1e-3
    )


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("at_loss", [False, True])
@pytest.mark.parametrize("at_step", [False, True])
def test_autocast_is_that_of_the_step(at_loss, at_step, evaluator):
    device = torch.get_default_device().type

    def autocast(enabled):
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = sgd(model, lr=0.05)
    scheduler = AutoLR(
        optimizer, model, calibration_steps=0, probe_every_steps=1, rule=Rule(FACTORS_5), evaluator=evaluator
    )
    x, y, prev = torch.randn(12, 5), torch.randint(3, (12,)), parameters_of(model)

    def loss_of(model):
        return F.cross_entropy(model(x), y) + float(torch.is_autocast_enabled(device))

    with autocast(at_loss):
        loss = scheduler.loss(lambda: loss_of(model))
    loss.backward()
    optimizer.step()
    with autocast(at_step):
        scheduler.step()
        assert torch.is_autocast_enabled(device) == at_step

    with autocast(at_loss):
        expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
    assert (min(expected) > 1.5) == at_loss  # the losses tell which it was
    coarse = at_loss and evaluator == "stacked"
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-3 if coarse else 1e-6)


# A replay that is not the step


class Keeps(nn.Module):
    """Adds what it returned the last time."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.last = torch.zeros(3)

    def forward(self, x):
        scores = self.inner(x) + 9 * self.last
        self.last = scores.detach().mean(0)
        return scores


def read_late(model):
    """A function that the closure calls finds the next batch."""
    batches = {"x": torch.randn(12, 5), "y": torch.randint(3, (12,))}
    helper = lambda model: F.cross_entropy(model(batches["x"]), batches["y"])  # noqa: E731
    return helper, lambda: batches.update(x=torch.randn(12, 5))


def changed_behind(model):
    """The batch is overwritten once the loss is computed, where AutoLR does not see it."""
    x, y = torch.randn(12, 5), torch.randint(3, (12,))

    class Loader:  # attributes of classes are not looked at
        batch = x

    def loss_of(model):
        loss = F.cross_entropy(model(Loader.batch.clone()), y)
        Loader.batch.zero_()
        return loss

    return loss_of, lambda: None


def changed_between(model):
    """The batch is in a buffer that the loader fills again."""
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    return (lambda model: F.cross_entropy(model(x), y)), x.normal_


def kept(model):
    """The module keeps something from one forward to the next, and it enters the loss."""
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    return (lambda model: F.cross_entropy(model(x), y)), lambda: None


@pytest.mark.parametrize("evaluator", ["auto", *EVALUATORS])
@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("case", [read_late, changed_behind, changed_between, kept])
def test_a_replay_that_is_not_the_step_is_told_once_with_both_losses(case, which, evaluator):
    model = Keeps() if case is kept else nn.Linear(5, 3)
    optimizer = sgd(model, lr=0.05)
    scheduler = AutoLR(optimizer, model, evaluator=evaluator, micro_batches=which, **EACH_STEP)
    with pytest.warns(match=CHANGED) as caught:
        for step in range(3):
            loss_of, between = case(model)
            optimizer.zero_grad()
            prev = parameters_of(model)
            loss = scheduler.loss(lambda: loss_of(model))  # noqa: B023
            loss.backward()
            between()
            optimizer.step()
            if step == 0:
                now = losses_of_copies(model, prev, [0.0], loss_of)[0]
            scheduler.step()
            if step == 0:
                first = loss.item()
    assert [each.filename for each in caught] == [__file__]
    said = f"scheduler.loss returned {first:.6g}, and the closure now returns {now:.6g} at the same parameters"
    assert str(caught[0].message).startswith(said)
    assert f"{first:.3g}" != f"{now:.3g}"
    assert scheduler.last_probe.step == 3


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_by_the_heat_alone_a_replay_is_compared_where_the_last_step_began(every, changes):
    """There training saw the loss, and not where the line over several steps begins."""
    model = nn.Linear(5, 3)
    optimizer = sgd(model, lr=0.5)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", calibration_steps=0, probe_every_steps=every)
    runs = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while scheduler.last_probe is None:
            x, y, ran = torch.randn(12, 5), torch.randint(3, (12,)), []

            def loss_of(model, x=x, y=y, ran=ran):
                ran.append(1)
                return F.cross_entropy(model(x), y)

            optimizer.zero_grad()
            prev = parameters_of(model)
            loss = scheduler.loss(lambda: loss_of(model))
            loss.backward()
            if changes:
                x.normal_()
            optimizer.step()
            scheduler.step()
            runs.append(len(ran))
    told = [str(each.message) for each in caught if CHANGED in str(each.message)]
    now = losses_of_copies(model, prev, [0.0], loss_of)[0]
    assert len(told) == changes
    said = (
        f"scheduler.loss returned {loss.item():.6g}, and the closure now returns {now:.6g} at the same parameters"
    )
    assert all(each.startswith(said) for each in told)
    assert scheduler.last_probe.losses[1].item() == pytest.approx(now if changes else loss.item(), rel=1e-6)
    if not changes:
        assert runs == [1] * (len(runs) - 1) + [1 + 1 + 1]  # of the step, to check it, of the mean


def test_a_batch_that_each_forward_changes_in_place_is_an_error():
    """No two candidates would see the same."""
    model = nn.Linear(5, 3)
    optimizer = sgd(model, lr=0.05)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", **EACH_STEP)
    x, y = torch.rand(12, 5), torch.randint(3, (12,))

    class Loader:  # attributes of classes are not looked at; what is, is refused by scheduler.loss
        batch = x

    scheduler.loss(lambda: F.cross_entropy(model(Loader.batch.sub_(0.5).div_(0.25)), y)).backward()
    optimizer.step()
    left = everything(model, optimizer)
    with pytest.raises(ClosureError, match=r"closure returned .* and then .* at the same weights; all candidates"):
        scheduler.step()
    assert_same(left, everything(model, optimizer))


AS_IT_WAS = {
    "dropout and BatchNorm": (lambda: convnet(0.5), of_dropout, contextlib.nullcontext),
    "noise": (lambda: convnet(0.3), NOISES["all"][1], contextlib.nullcontext),
    "autocast": (
        lambda: convnet(0.3),
        of_dropout,
        lambda: torch.autocast(torch.get_default_device().type, torch.bfloat16),
    ),
    "a loss of zero": (
        lambda: convnet(0.0),
        lambda model, x, y: 0 * of_dropout(model, x, y),
        contextlib.nullcontext,
    ),
    "a loss below zero": (lambda: convnet(0.3), lambda *batch: -of_dropout(*batch), contextlib.nullcontext),
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("calibration", [0, 3])
@pytest.mark.parametrize("case", sorted(AS_IT_WAS))
def test_a_replay_of_the_step_is_not_told(case, calibration, which, micro_batches):
    make, loss_of, within = AS_IT_WAS[case]
    model = make()
    optimizer = sgd(model, lr=0.05)
    settings = {**EACH_STEP, "calibration_steps": calibration}
    scheduler = AutoLR(optimizer, model, evaluator="inplace", micro_batches=which, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(micro_batches):
                x, y = batch()
                with within():
                    loss = scheduler.loss(lambda x=x, y=y: loss_of(model, x, y))
                loss.backward()
            optimizer.step()
            scheduler.step()
    assert not any("at the same parameters" in str(each.message) for each in caught)
    assert scheduler.last_probe.step == 2


@pytest.mark.parametrize(
    ("way", "window", "calls"),
    [
        ("loss", 1, [1 + 1 + 5, 1 + 5, 1 + 5]),  # of the step, to check it, of the candidates
        ("step", 1, [2 + 5, 5, 5]),
        ("remember", 1, [2 + 1 + 5, 5, 5]),  # to compare with its loss with gradients on
        ("loss", 2, [1 + 1 + 5, 1 + 5, 1 + 5]),  # of which the first has one step too
    ],
)
def test_the_first_probe_checks_the_closure_and_the_later_ones_do_not(way, window, calls):
    model = nn.Linear(5, 3)
    optimizer = sgd(model, lr=0.05)
    rule = Rule(FACTORS_5, window_steps=window)
    scheduler = AutoLR(optimizer, model, evaluator="inplace", max_heat=math.inf, **{**EACH_STEP, "rule": rule})
    counts = []
    for _ in calls:
        x, y, ran = torch.randn(12, 5), torch.randint(3, (12,)), []

        def closure(x=x, y=y, ran=ran):
            ran.append(1)
            return F.cross_entropy(model(x), y)

        optimizer.zero_grad()
        if way == "remember":
            scheduler.remember(closure)
        (scheduler.loss(closure) if way == "loss" else F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        scheduler.step(*([closure] if way == "step" else []))
        counts.append(len(ran))
    assert counts == calls


def test_over_several_steps_the_closure_is_run_three_times_to_check_it():
    """Where the window began, the loss of the last batch is not known. The third run has gradients on."""
    model = nn.Linear(5, 3)
    optimizer = sgd(model, lr=0.05)
    settings = {"calibration_steps": 0, "probe_every_steps": 2, "rule": Rule(FACTORS_5, window_steps=2)}
    scheduler = AutoLR(optimizer, model, evaluator="inplace", max_heat=math.inf, **settings)
    ran = []
    for _ in range(4):
        x, y = torch.randn(12, 5), torch.randint(3, (12,))
        optimizer.zero_grad()
        scheduler.loss(lambda x=x, y=y: ran.append(1) or F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        scheduler.step()
    assert len(ran) == 4 + 3 + 2 * 5


MICRO_BATCHES = {"last": lambda losses: losses[-1], "all": lambda losses: sum(losses) / len(losses)}


@pytest.mark.parametrize("evaluator", ["inplace", "streamed", "stacked"])
@pytest.mark.parametrize("which", sorted(MICRO_BATCHES))
def test_each_micro_batch_is_replayed_with_its_own_noise(which, evaluator):
    dropout, loss_of = NOISES["all"]
    model, optimizer, scheduler = start(dropout, evaluator, micro_batches=which)
    for _ in range(2):  # nothing of one step is left for the next
        prev, parts = parameters_of(model), []
        optimizer.zero_grad()
        for _ in range(3):
            x, y = batch()
            states = random_states()
            parts.append(from_states(states, lambda model, x=x, y=y: loss_of(model, x, y)))
            (scheduler.loss(lambda x=x, y=y: loss_of(model, x, y)) / 3).backward()
            draw()
        optimizer.step()
        step_unnoticed(model, optimizer, scheduler)
    losses = [losses_of_copies(model, prev, FACTORS_5, part) for part in parts]
    expected = [MICRO_BATCHES[which](losses_of_one) for losses_of_one in zip(*losses, strict=True)]
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(losses[0], rel=1e-3)


def test_a_graph_is_of_one_micro_batch():
    model, optimizer, scheduler = start(0.3, "graphed", micro_batches="all")
    x, y = batch()
    scheduler.loss(lambda: of_dropout(model, x, y)).backward()
    optimizer.step()
    scheduler.step()
    assert scheduler.last_probe.step == 1
    for _ in range(2):
        scheduler.loss(lambda: of_dropout(model, x, y)).backward()
    optimizer.step()
    before, left = everything(model, optimizer), random_states()
    with pytest.raises(EvaluatorError, match=r"'graphed' cannot serve.*use micro_batches='last'"):
        scheduler.step()
    assert_same(before, everything(model, optimizer))
    assert str(random_states()) == str(left)


@pytest.mark.parametrize("which", ["first", None, ["last"]])
def test_micro_batches_are_the_last_or_all(which):
    with pytest.raises(ValueError, match=r"micro_batches=.* is not known: use 'last' or 'all'"):
        start(0.0, micro_batches=which)


LOOP = """
for step in range(2):
    optimizer.zero_grad()
    parts, prev = [], parameters_of(model)
    for micro in range(3):
        x, y = batch()
        states = random_states()
        parts.append(from_states(states, lambda model, x=x, y=y: loss_of(model, x, y)))
        scheduler.loss(lambda: {closure}).backward()
    x, y = batch()  # the next one is fetched before the step
    optimizer.step()
    scheduler.step()
"""


@pytest.mark.parametrize("scope", ["module", "function"])
@pytest.mark.parametrize("which", sorted(MICRO_BATCHES))
@pytest.mark.parametrize("closure", ["loss_of(model, x, y)", "(lambda scale: scale * loss_of(model, x, y))(1.0)"])
def test_the_loops_variables_go_on_and_the_batch_does_not(closure, which, scope):
    """Python looks ``x`` and ``y`` up when a closure runs."""
    dropout, loss_of = NOISES["all"]
    model, optimizer, scheduler = start(dropout, micro_batches=which)
    variables = {**globals(), "model": model, "optimizer": optimizer, "scheduler": scheduler, "loss_of": loss_of}
    if scope == "module":
        exec(LOOP.format(closure=closure), variables)
        found = variables
    else:
        body = LOOP.format(closure=closure).replace("\n", "\n    ")
        exec(f"def loop():{body}\n    return locals()", variables)
        found = variables["loop"]()
    losses = [losses_of_copies(model, found["prev"], FACTORS_5, part) for part in found["parts"]]
    expected = [MICRO_BATCHES[which](losses_of_one) for losses_of_one in zip(*losses, strict=True)]
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_what_a_closure_writes_to_its_variables_is_forgotten():
    """Each candidate finds them as the step did, and the loop finds them as training left them."""
    model, optimizer, scheduler = start(0.0)
    (x, y), prev, calls = batch(), parameters_of(model), 3

    def closure():
        nonlocal calls
        calls += 1
        return calls * of_dropout(model, x, y)

    scheduler.loss(closure).backward()
    optimizer.step()
    scheduler.step()
    assert calls == 4
    expected = losses_of_copies(model, prev, FACTORS_5, lambda copy: 4 * of_dropout(copy, x, y))
    assert scheduler.last_probe.losses.tolist() == expected
