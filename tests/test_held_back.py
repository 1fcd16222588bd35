"""A loss on examples held back: when it has stopped falling, and the annealing that begins then."""

import copy
import logging
import math
import random

import pytest
import torch
import torch.nn.functional as F

from autolr_fast import AutoLR
from autolr_fast._level.held_back import HeldBack

from .helpers import mlp


def alarm(losses, every=10, training=-math.inf):
    """The step of the alarm, if there is one."""
    held_back = HeldBack()
    steps = [step for step, loss in enumerate(losses, 1) if held_back.add(every * step, loss, training)]
    assert len(steps) <= 1
    assert held_back.began == (every * steps[0] if steps else None)
    return held_back.began


# The rule


def noisy(values, deviation):
    stream = random.Random(0)
    return [value + stream.gauss(0, deviation) for value in values]


FALLING = [4 / (1 + 0.1 * i) for i in range(200)]
U_SHAPED = [5 - 0.25 * i if i < 11 else 2.25 + 0.25 * (i - 11) for i in range(40)]
SPIKES = [loss + 3 * (i % 7 == 3) for i, loss in enumerate(FALLING)]
CURVES = {
    "falling": (FALLING, None),
    "noisy falling": (noisy(FALLING, 0.01), None),
    "falling with spikes": (SPIKES, None),
    "rising": ([1 + 0.1 * i for i in range(50)], 120),  # lowest at 10, and training is below
    "flat from the start": ([1.0] * 50, 120),
    "falls, then flat": ([3.0, 2.0, *[1.0] * 60], 120),  # a fifth of the steps were at 40 already
    "falls for long, then flat": (FALLING[:40] + [FALLING[39]] * 60, 510),  # no new low since 400
    "u-shaped": (U_SHAPED, 160),  # four losses since 120
    "noisy u-shaped": (noisy(U_SHAPED, 0.1), 160),
    "u-shaped with nan": ([math.nan if i % 5 == 1 else loss for i, loss in enumerate(U_SHAPED)], 160),
    "nan": ([math.nan] * 50, None),
    "nan after a fall": ([3.0, 2.0, 1.0, *[math.inf] * 50], None),
}


@pytest.mark.parametrize("name", CURVES)
def test_alarms_on_curves(name):
    losses, expected = CURVES[name]
    assert alarm(losses) == expected


@pytest.mark.parametrize(("training", "expected"), [(0.9, 120), (1.0, None), (math.nan, None)])
def test_losses_that_never_fall_end_a_training_that_learns_more(training, expected):
    assert alarm([1.0, *[1.5] * 200], training=training) == expected


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_units_and_offsets_play_no_part(unit):
    losses = noisy(U_SHAPED, 0.1)
    for training in (1.0, 2.25):
        in_units = alarm([unit * (loss - 7) for loss in losses], training=unit * (training - 7))
        assert in_units == alarm(losses, training=training)


@pytest.mark.parametrize(("every", "expected"), [(1, 100), (2, 100), (10, 120), (1000, 12_000)])
def test_neither_few_losses_nor_few_steps_give_the_alarm(every, expected):
    assert alarm([3.0, 2.0, 1.0, *[2.0] * 200], every) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.11, 260), (0.09, 600), (-0.5, 600), (math.nan, 600)])
def test_training_counts_by_how_far_it_is_below_the_lowest(share, expected):
    fall = [5.0, 4.0, 3.0, 2.0, 1.0] + [1.0 - 0.01 * i for i in range(15)]  # the lowest is .86, after 200
    assert alarm([*fall, *[0.9] * 60], training=0.86 - share * (5 - 0.86)) == expected
    assert alarm([*fall, *[0.9, 9.0, 0.9] * 20], training=0.86 - share * (5 - 0.86)) == expected


def test_a_second_loss_of_a_step_is_left_out():
    held_back = HeldBack()
    for step in range(1, 30):
        held_back.add(step, 1 / step, 0.0)
        before = held_back.state()
        assert not held_back.add(step, 7.0, 0.0)
        assert held_back.state() == before


def test_a_straight_line_leads_to_zero():
    held_back = HeldBack()
    assert (held_back.end, held_back.left(99)) == (None, 1.0)
    for step in range(10, 150, 10):
        held_back.add(step, max(1.0, 4 - step / 10), 0.0)
    assert (held_back.began, held_back.end) == (120, 180)
    assert [held_back.left(step) for step in (100, 120, 150, 174, 180, 400)] == pytest.approx(
        [1, 1, 0.5, 0.1, 0, 0]
    )


# The scheduler


def start(lr=0.05, tensor=False, **options):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(lr) if tensor else lr, momentum=0.9)
    return model, optimizer, AutoLR(optimizer, model, **{"evaluator": "inplace", **options})


def run(model, optimizer, scheduler, steps, held=None):
    """Train; the losses held back are U-shaped. Return the multipliers after each step."""
    seen = []
    width = next(model.parameters()).shape[1]
    for step in steps:
        stream = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, width, generator=stream), torch.randint(3, (16,), generator=stream)
        optimizer.zero_grad()
        scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 9 and held is not False:
            loss = U_SHAPED[min(step // 10, 39)]
            scheduler.watch(loss if held is None else held(loss))
        seen.append(float(scheduler.get_last_lr()[0]) / scheduler.level[0])
    return seen


@pytest.mark.parametrize("options", [{"total_steps": 1000}, {"total_steps": 1000, "anneal": "linear"}, {}])
def test_it_anneals_from_the_alarm(options, caplog):
    caplog.set_level(logging.INFO, logger="autolr_fast")
    without = run(*start(**options), range(160), held=False)
    training = start(**options)
    scheduler = training[2]
    assert run(*training, range(160)) == without  # nothing is changed until the alarm
    message = "lowest 2.25 after step 120): the learning rate is annealed from step 160 to its end at step 240"
    assert [record for record in caplog.records if message in record.message]
    seen = run(*training, range(160, 239))
    assert seen == pytest.approx([without[-1] * (80 - i) / 80 for i in range(1, 80)], rel=1e-6)
    assert not scheduler.has_ended
    assert scheduler.last_probe.step <= 171  # averages that had begun are seen to their end
    run(*training, [239])
    assert scheduler.has_ended
    assert scheduler.get_last_lr() == [1e-12]
    run(*training, range(240, 250))  # until the next evaluation
    with pytest.warns(UserWarning, match="past step 240, .* stop when scheduler.has_ended"):
        run(*training, [250])


def test_the_annealing_asked_for_is_never_exceeded():
    training = start(total_steps=180)
    run(*training, range(160))
    assert run(*training, range(160, 180)) == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * step / 180)) for step in range(161, 180)] + [0.0], abs=1e-9
    )
    assert training[2].has_ended


def test_total_steps_end_it_without_a_loss_held_back():
    training = start(total_steps=5)
    run(*training, range(4), held=False)
    assert not training[2].has_ended
    run(*training, [4], held=False)
    assert training[2].has_ended


def test_maximize_is_higher_better():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, maximize=True)
    scheduler = AutoLR(optimizer, model, total_steps=1000, probe_every_steps=None)
    width = next(model.parameters()).shape[1]
    for step in range(160):
        optimizer.zero_grad()
        scheduler.loss(lambda: -model(torch.ones(4, width)).square().mean()).backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 9:
            scheduler.watch(-U_SHAPED[step // 10])
    assert scheduler.state_dict()["held_back"]["began"] == 160


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("options", [{"total_steps": 400}, {}])
def test_a_cut_run_is_the_same(options, tensor):
    whole = start(tensor=tensor, **options)
    rates, states = [], {}
    for step in range(240):
        run(*whole, [step])
        rates.append([float(lr) for lr in whole[2].get_last_lr()])
        if step in (95, 119, 157, 159, 160, 163, 200):
            states[step] = copy.deepcopy([each.state_dict() for each in whole])
    for cut, of_all in states.items():
        parts = start(tensor=tensor, **options)
        for part, state in zip(parts, of_all, strict=True):
            part.load_state_dict(state)
        resumed = []
        for step in range(cut + 1, 240):
            run(*parts, [step])
            resumed.append([float(lr) for lr in parts[2].get_last_lr()])
        assert resumed == rates[cut + 1 :]
        assert parts[2].state_dict()["held_back"] == whole[2].state_dict()["held_back"]


@pytest.mark.parametrize("kind", [lambda x: torch.tensor(x, requires_grad=True), lambda x: torch.tensor([x])])
def test_a_tensor_is_read(kind):
    training = start()
    run(*training, range(165), held=kind)
    assert training[2].state_dict()["held_back"]["began"] == 160


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("0.5", TypeError, "loss='0.5': expected a real number, or a tensor of one"),
        (None, TypeError, "loss=None"),
        (True, TypeError, "loss=True"),
        (torch.tensor(1j), TypeError, "loss=1j"),
        (torch.ones(3), ValueError, r"loss has shape \[3\]: give one number, as loss.mean\(\)"),
        (torch.ones(0), ValueError, r"shape \[0\]"),
    ],
)
def test_what_is_no_loss_is_refused(loss, error, message):
    training = start()
    run(*training, range(2))
    with pytest.raises(error, match=message):
        training[2].watch(loss)


def test_there_is_a_step_before_it():
    with pytest.raises(RuntimeError, match=r"watch\(loss=1\) came before the first step: call it after"):
        start()[2].watch(1.0)


def test_the_mean_over_the_ranks_decides(monkeypatch):
    seen = []

    def mean(tensor, process_group):
        seen.append((tensor.item(), tensor.dtype, process_group))
        return tensor + 100

    monkeypatch.setattr("autolr_fast.scheduler.is_distributed", lambda: True)
    monkeypatch.setattr("autolr_fast.scheduler.mean_over_ranks", mean)
    training = start()
    run(*training, range(3))
    training[2].watch(2.5)
    assert seen == [(2.5, torch.float64, None)]
    assert training[2].state_dict()["held_back"]["first"] == 102.5
