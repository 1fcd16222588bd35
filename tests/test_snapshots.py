import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolr_fast import ClosureError
from autolr_fast._optimizers import Optimizers
from autolr_fast._steps import ProbeSchedule, ProbeTracker, Snapshots, StepCounter, StepLine

from .helpers import mlp, problem, train_step


def counted(optimizer, schedule):
    """Snapshots that are kept as steps are counted."""
    optimizers = Optimizers(optimizer)
    snapshots = Snapshots(optimizers, schedule)
    return snapshots, StepCounter(optimizers, before_step=snapshots.keep)


def starts(schedule, step):
    """After how many steps the lines of a probe begin."""
    window = schedule.window_at(step)
    if window is None:
        return set()
    others = {2} if step <= schedule.first_steps else {1, schedule.mean_steps} if schedule.mean_steps else set()
    return {step - back for back in {window, *others} if back <= step}


@given(
    st.none() | st.integers(1, 12),
    st.integers(0, 12),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from([0, 0, 2, 5, 9]),
)
def test_every_probe_finds_its_snapshots_and_none_is_kept_in_vain(every, first, windows, mean_steps):
    schedule = ProbeSchedule(every, first, tuple(windows), mean_steps=mean_steps)
    model, loss_of = mlp(), lambda model: model(torch.ones(1, 5)).square().sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    snapshots, counter = counted(optimizer, schedule)
    history = []
    for step in range(1, 30):
        history.append([p.detach().clone() for p in model.parameters()])
        train_step(model, optimizer, loss_of)
        assert counter.steps == step
        if schedule.window_at(step):
            assert step <= first or step % every == 0
            for start in starts(schedule, step):
                assert all(map(torch.equal, snapshots._kept[start].values(), history[start]))
        snapshots.drop_used(step)
        needed = {start for m in range(step + 1, step + 10) for start in starts(schedule, m) if start < step}
        assert set(snapshots._kept) == needed


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_counted(fused):
    model, loss_of = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counter = StepCounter(Optimizers(optimizer))
    counts = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if step in (0, 2):
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        counts.append(counter.steps)
    assert counts == [0, 1, 1, 2]


def test_frozen_parameters_take_no_memory():
    model, loss_of = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model[0].requires_grad_(False)
    snapshots, _counter = counted(optimizer, ProbeSchedule(1, 0, (1,)))  # it counts while it lives
    train_step(model, optimizer, loss_of)
    assert set(snapshots._kept[0]) == set(model[2].parameters())


def test_hooks_go_with_their_owner_without_the_garbage_collector():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gc.disable()
    try:
        counter = StepCounter(Optimizers(optimizer))
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        gone = weakref.ref(counter)
        del counter
        assert gone() is None
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    finally:
        gc.enable()


def test_what_is_kept_from_between_goes_with_steps_that_are_taken_again():
    parameter = torch.nn.Parameter(torch.randn(200))
    optimizers = Optimizers(torch.optim.SGD([parameter], lr=0.1))
    snapshots = Snapshots(optimizers, ProbeSchedule(1, 0, (2, 1)))
    start, between, end = torch.randn(2, 200).tolist(), None, parameter.detach().clone()
    start, between = map(torch.tensor, start)
    expected, ends = start + 0.25 * (between - start), start + 0.25 * (end - start)
    snapshots._kept = {1: {parameter: start}, 2: {parameter: between}}
    snapshots.retake(StepLine(snapshots._kept[1], {}, window=2), 0.25, steps=3)
    torch.testing.assert_close(snapshots._kept[2][parameter], expected)
    torch.testing.assert_close(parameter.detach(), ends)


def test_a_tracker_tells_of_probes_that_were_given_no_closure():
    tracker = ProbeTracker(ProbeSchedule(every_steps=5, first_steps=2, windows=(1,)))
    assert [step for step in range(12) if tracker.window_due(step)] == [1, 2, 5, 10]
    tracker.offered = tracker.probed = 5
    assert tracker.window_due(5) is None
    assert not tracker.missed(range(10))
    assert "no loss came through AutoLR for this step" in tracker.missed(range(11))
    resumed = ProbeTracker(tracker.schedule)
    resumed.load(tracker.state(), steps=9)
    assert (resumed.probed, resumed.offered) == (5, 5)


def test_a_tracker_refuses_a_calibration_to_which_no_closure_came():
    tracker = ProbeTracker(ProbeSchedule(every_steps=5, first_steps=2, windows=(1,)))
    assert "no loss came through AutoLR for this step" in tracker.missed(range(2))
    with pytest.raises(ClosureError, match=r"none of the probes due in 2 steps could be made.*SequentialLR"):
        tracker.missed(range(3))
    tracker.offered = 1
    assert "for this step" in tracker.missed(range(3))


@pytest.mark.parametrize(
    ("every", "first", "error", "says"),
    [
        (0, 20, ValueError, "probe_every_steps=0: expected 1 or more"),
        (2.5, 20, TypeError, "probe_every_steps=2.5: expected a whole number"),
        (10, -1, ValueError, "calibration_steps=-1"),
        (10, True, TypeError, "calibration_steps=True"),
    ],
)
def test_bad_schedules(every, first, error, says):
    with pytest.raises(error, match=says):
        ProbeSchedule(every, first, (1,))
