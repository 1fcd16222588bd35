import gc
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autolr_fast import AutoLR
from autolr_fast.reconstruction import sample
from autolr_fast.snapshots import Cadence, Snapshot, Snapshots, windows_for

from .helpers import mlp, problem, train_step


@given(
    st.none() | st.integers(1, 12),
    st.integers(0, 12),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_every_probe_finds_its_snapshot_and_none_is_kept_in_vain(every, calibrate, windows):
    cadence = Cadence(every, calibrate, tuple(windows))
    model, loss_of = mlp(), lambda model: model(torch.ones(1, 5)).square().sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    snapshots = Snapshots(optimizer, cadence)
    history = []
    for step in range(1, 30):
        history.append([p.detach().clone() for p in model.parameters()])
        train_step(model, optimizer, loss_of)
        assert snapshots.steps == step
        if window := cadence.window_at(step):
            assert step <= calibrate or step % every == 0
            taken = snapshots._taken[step - window]
            expected = [sample(value) if taken.sampled else value for value in history[step - window]]
            assert all(map(torch.equal, taken.values.values(), expected))
        snapshots.drop_used()
        probes = [(m, cadence.window_at(m)) for m in range(step + 1, step + 10)]
        needed = {m - window for m, window in probes if window and m - window < step}
        assert set(snapshots._taken) == needed


@pytest.mark.parametrize(
    ("build", "open_after"),
    [
        (torch.optim.SGD, [29, 39, 49, 59]),
        (partial(torch.optim.SGD, momentum=0.9), [29, 49]),
        (torch.optim.AdamW, [28, 29, 48, 49]),
    ],
)
def test_default_keeps_nothing_between_probes(build, open_after):
    model, loss_of = problem("mlp")
    optimizer = build(model.parameters(), lr=0.01)
    snapshots = Snapshots(optimizer, Cadence(every=10, calibrate=20, windows=windows_for(optimizer)))
    held = []
    for _ in range(60):
        train_step(model, optimizer, loss_of)
        snapshots.drop_used()
        held.append(len(snapshots._taken))
    assert max(held) == 1
    assert [step for step, count in enumerate(held, 1) if count and step > 20] == open_after


@pytest.mark.parametrize(
    "options", [{}, {"every": 2, "calibrate": 0}, {"every": 1, "calibrate": 0}, {"window": (1, 2)}]
)
@pytest.mark.parametrize("build", [torch.optim.AdamW, torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9)])
def test_no_probe_is_left_out_where_the_state_tells_some_windows_only(monkeypatch, build, options):
    """Also of windows that overlap, and of which it tells the shorter one."""
    probed = []
    for small in (0, 1 << 30):
        monkeypatch.setattr("autolr_fast.memory.SMALL", small)
        model, loss_of = problem("mlp")
        optimizer = build(model.parameters(), lr=0.01)
        scheduler = AutoLR(optimizer, model, evaluator="inplace", **options)
        probes = []
        for _ in range(40):
            train_step(model, optimizer, loss_of)
            scheduler.step(partial(loss_of, model))
            if scheduler.last_probe:
                probes.append((scheduler.last_probe.step, scheduler.last_probe.window))
        probed.append(list(dict.fromkeys(probes)))
    assert probed[0] == probed[1]
    every, first = options.get("every", 10), options.get("calibrate", 20)
    assert [step for step, _ in probed[0]] == [s for s in range(1, 41) if s <= first or s % every == 0]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_counted(fused):
    model, loss_of = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    snapshots = Snapshots(optimizer, Cadence(every=1, calibrate=0, windows=(1,)))
    counts = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if step in (0, 2):
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        counts.append(snapshots.steps)
    assert counts == [0, 1, 1, 2]


def test_frozen_parameters_take_no_memory():
    model, loss_of = problem("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model[0].requires_grad_(False)
    snapshots = Snapshots(optimizer, Cadence(every=1, calibrate=0, windows=(1,)))
    train_step(model, optimizer, loss_of)
    assert set(snapshots._taken[0].values) == set(model[2].parameters())


def test_hooks_go_with_their_owner_without_the_garbage_collector():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gc.disable()
    try:
        snapshots = Snapshots(optimizer, Cadence(every=1, calibrate=0, windows=(1,)))
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        gone = weakref.ref(snapshots)
        del snapshots
        assert gone() is None
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    finally:
        gc.enable()


@pytest.mark.parametrize(("start_sampled", "sampled"), [(False, False), (False, True), (True, True), (True, False)])
def test_what_is_kept_from_between_goes_with_steps_that_are_taken_again(start_sampled, sampled):
    """Whole or as samples; where only samples tell where the steps began, nothing whole can, and is dropped."""
    parameter = torch.nn.Parameter(torch.randn(200))
    snapshots = Snapshots(torch.optim.SGD([parameter], lr=0.1), Cadence(every=1, calibrate=0, windows=(2, 1)))
    start, between = torch.randn(2, 200)
    expected = start + 0.25 * (between - start)
    snapshots.steps = 3
    snapshots._taken = {
        1: Snapshot({parameter: sample(start) if start_sampled else start}, start_sampled),
        2: Snapshot({parameter: sample(between) if sampled else between}, sampled),
    }
    snapshots.retake(0.25, window=2)
    if start_sampled and not sampled:
        assert list(snapshots._taken) == [1]
    else:
        kept = snapshots._taken[2].values[parameter]
        torch.testing.assert_close(kept, sample(expected) if sampled else expected)
