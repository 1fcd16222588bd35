"""Probes that are due and left out, while the level stands still: which they are, and what is seen without them."""

import io
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autolr_fast import AutoLR, Rule
from autolr_fast._steps import Pace

from .helpers import assert_same, everything, mlp, raise_rate


def made_by(moves):
    """Return which of 200 probes are made, where the n-th that is made moves the level by ``moves[n]``, or not."""
    pace, made, moves = Pace(), [], iter(moves)
    for probe in range(200):
        if not pace.leaves_out():
            made.append(probe)
            pace.see(next(moves, 1.0))
    return made


@given(st.lists(st.floats(0.1, 1), max_size=150), st.sampled_from([1, -1]))
def test_while_the_level_moves_far_one_way_no_probe_is_left_out(sizes, sign):
    made = made_by([math.exp(sign * size) for size in sizes])
    assert made[: len(sizes) + 1] == list(range(len(sizes) + 1))


@given(st.lists(st.sampled_from([0.5, 0.95, 1.0, 1.05, 1.15, 2.0]), max_size=150))
def test_from_one_probe_to_the_next_are_one_to_eight(moves):
    gaps = [after - before for before, after in itertools.pairwise(made_by(moves))]
    assert set(gaps) <= {1, 2, 4, 8}
    assert all(after in (1, min(2 * before, 8)) for before, after in itertools.pairwise(gaps))


@pytest.mark.parametrize("moves", [[1.0], [1.04] * 60, [1.06, 1 / 1.06] * 30, [1.09, 1 / 1.09] * 30])
def test_small_moves_and_those_that_cancel_make_probes_rare(moves):
    assert made_by(moves)[:8] == [0, 2, 6, 14, 22, 30, 38, 46]


@pytest.mark.parametrize("move", [1.12, 0.85, 3.0])
def test_a_far_move_has_the_next_probe_made_at_once(move):
    """After a long time without one."""
    made = made_by([1.0] * 6 + [move])
    assert made[6:8] == [38, 39]


def test_a_pace_that_is_held_leaves_none_out_until_it_begins_anew():
    pace = Pace()
    for _ in range(5):
        pace.leaves_out()
        pace.see(1.0)
    again = Pace()
    again.load(pace.state())
    again.hold()
    held = Pace()
    held.load(again.state())
    assert pace.leaves_out()
    assert not any(held.leaves_out() or held.see(1.0) for _ in range(20))
    held.begin_anew()
    assert held.state() == Pace().state()


class Task:
    """A training that hears of each step's loss, whose closure can be made steep."""

    def __init__(self, seed=1, **options):
        torch.manual_seed(seed)
        self.model = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        options = {"total_steps": 2000, "evaluator": "inplace", **options}
        self.scheduler = AutoLR(self.optimizer, self.model, **options)
        self.through_loss = True
        self.scales = {}  # of a step's batch

    def step(self):
        x = self.scales.get(self.scheduler.last_epoch + 1, 1.0) * torch.randn(16, 5)

        def closure():
            return nn.functional.mse_loss(self.model(x), x[:, :3])

        self.optimizer.zero_grad()
        (self.scheduler.loss(closure) if self.through_loss else closure()).backward()
        self.optimizer.step()
        self.scheduler.step(*([] if self.through_loss else [closure]))

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return [probe.step for probe in self.scheduler.history]


def still(monkeypatch):
    """Make probes see what moves nothing."""
    monkeypatch.setattr(Pace, "see", lambda self, factor, see=Pace.see: see(self, 1.0))


def test_the_first_steps_and_later_ones_are_probed_less_and_less_often(monkeypatch):
    still(monkeypatch)
    made = Task().run(600)
    assert made[:5] == [1, 2, 4, 8, 16]
    assert made[5:22] == list(range(30, 200, 10))
    later = made[21:]
    assert all(step / 10 >= step - before > step / 10 - 20 for before, step in itertools.pairwise(later))


def test_of_the_first_steps_those_above_where_training_began_are_all_probed(monkeypatch):
    """A rate that is too high shows first in losses of new batches, and by less than a blow-up."""
    still(monkeypatch)
    task = Task()
    task.scales = dict.fromkeys((5, 6, 11), 2.5)
    made = task.run(20)
    assert made[:5] == [1, 2, 4, 5, 6]
    assert 11 in made
    assert len(made) < 12


@pytest.mark.parametrize("case", ["closure after the step", "rule"])
def test_none_is_left_out_later_where_nothing_else_tells_of_a_rate_too_high(case, monkeypatch):
    """A rule asks for a probe each ten steps, and a closure that comes after the step has no loss before it."""
    still(monkeypatch)
    task = Task(rule=Rule() if case == "rule" else None)
    task.through_loss = case == "rule"
    made = task.run(80)
    assert made[-6:] == [30, 40, 50, 60, 70, 80]
    if case != "rule":
        assert made[:20] == list(range(1, 21))


@pytest.mark.parametrize("step", [3, 7, 11])
def test_a_step_too_long_whose_probe_is_left_out_is_taken_again_after_the_next(step, monkeypatch):
    """The loss of the next batch tells. Both steps are taken again, from before the first."""
    still(monkeypatch)
    task = Task()
    task.run(step - 1)
    before = [parameter.detach().clone() for parameter in task.model.parameters()]
    raise_rate(task.scheduler, 1e4)
    assert step not in task.run(1)
    assert task.run(1)[-1] == step + 1
    probe = task.scheduler.last_probe
    assert (probe.window, probe.losses[0] > 4 * probe.losses[1]) == (2, True)
    assert probe.retaken < 1e-2
    moved = max((now - then).abs().max() for now, then in zip(task.model.parameters(), before, strict=True))
    assert moved < 2  # else about 1,000


def test_a_later_blow_up_has_a_probe_that_was_to_be_left_out(monkeypatch):
    still(monkeypatch)
    task = Task()
    assert task.run(214)[-1] == 210  # the next is that at 240
    raise_rate(task.scheduler, 1e4)
    assert task.run(6)[-1] == 220
    assert task.scheduler.last_probe.retaken is not None
    assert task.run(10)[-1] == 230  # and the next one is made


def test_a_run_that_was_cut_where_probes_are_left_out_goes_on_the_same():
    whole, ends = Task(seed=0, probe_every_steps=3, calibration_steps=6), []
    torch.manual_seed(5)
    for _ in range(90):
        whole.step()
        file = io.BytesIO()
        states = whole.model.state_dict(), whole.optimizer.state_dict(), whole.scheduler.state_dict()
        torch.save([*states, torch.get_rng_state()], file)
        ends.append(file.getvalue())
    history = [probe.to_dict() for probe in whole.scheduler.history]
    assert len(history) <= 30  # of 34 that were due
    for cut in range(1, 90, 4):
        again = Task(seed=1, probe_every_steps=3, calibration_steps=6)
        weights, optimizer, scheduler, streams = torch.load(io.BytesIO(ends[cut - 1]), weights_only=True)
        again.model.load_state_dict(weights)
        again.optimizer.load_state_dict(optimizer)
        again.scheduler.load_state_dict(scheduler)
        torch.set_rng_state(streams)
        again.run(90 - cut)
        assert [probe.to_dict() for probe in again.scheduler.history] == history
        assert_same(everything(again.model, again.optimizer), everything(whole.model, whole.optimizer))
