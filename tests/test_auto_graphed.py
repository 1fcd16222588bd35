"""What ``evaluator="auto"`` makes of CUDA graphs, on simulated ones; ``test_gpu.py`` has the real ones."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autolr_fast import FACTORS_3, FACTORS_5, Auto, AutoLR, Rule
from autolr_fast._evaluators import auto as auto_module
from autolr_fast._isolation import Replay

from .helpers import assert_same, everything, losses_of_copies, problem, sgd
from .tape import WAITS, TapeRecorder
from .test_evaluators import probed, run_clock

pytestmark = pytest.mark.cpu


class Waits(TorchDispatchMode):
    """Warns of what would wait for a GPU, as torch does in its mode "warn"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _the_cpu_is_one_gpu(monkeypatch):
    modes = ["default"]
    inside = contextlib.ExitStack()

    def set_mode(mode):
        modes.append(mode)
        inside.enter_context(Waits()) if mode == "warn" else inside.close()

    monkeypatch.setattr(auto_module, "is_on_one_gpu", lambda parameters: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    yield
    assert modes[-1] == "default"


@pytest.fixture
def captures(monkeypatch):
    """The captures begun."""
    begun, record = [], TapeRecorder.record
    monkeypatch.setattr(TapeRecorder, "record", lambda self, run: begun.append(1) or record(self, run))
    return begun


def clock(monkeypatch, graphed=0.1, others=0.2):
    run_clock(monkeypatch, lambda evaluator: graphed if evaluator.name == "graphed" else others)


@pytest.mark.parametrize(("factors", "chosen"), [(FACTORS_3, "inplace"), (FACTORS_5, "streamed")])
def test_a_graph_that_is_faster_has_as_many_candidates_and_more(factors, chosen, monkeypatch, captures):
    clock(monkeypatch)
    model, loss_of = problem("convnet")
    optimizer, line, prev = probed(model, loss_of)
    before, auto = everything(model, optimizer), Auto()
    for count in (len(factors), 1, 7, len(factors) - 1, len(factors)):
        asked, begun = [0.3 * n for n in range(1, count + 1)], len(captures)
        losses = auto.losses(model, line, asked, lambda: loss_of(model))
        assert losses.tolist() == losses_of_copies(model, prev, asked, loss_of)
        assert_same(before, everything(model, optimizer))
        assert len(captures) > begun if count >= len(factors) else len(captures) == begun
    assert auto.name == "graphed"
    assert f"graphed 100 ms against 200 ms, {chosen} for fewer than {len(factors)} candidates)" in repr(auto)


def test_a_graph_that_is_hardly_faster_is_not_taken(monkeypatch, captures):
    clock(monkeypatch, graphed=0.195)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    auto = Auto()
    for _ in range(2):
        auto.losses(model, line, FACTORS_3, lambda: loss_of(model))
    assert repr(auto) == "'inplace' (auto: not measured for so few candidates; graphed 195 ms against 200 ms)"
    assert len(captures) == 1


def reads_back(model, x):
    loss = model(x).square().mean()
    return loss * (2.0 if loss.item() > 0 else 1.0)


def fails_in_a_capture(model, x):
    loss = model(x).square().mean()
    if torch.cuda.is_current_stream_capturing():
        raise OSError("no such library")
    return loss


def is_left_out(model, x):
    return model(x).square().mean() + float(model.weight.detach().numpy().sum())


@pytest.mark.parametrize(
    ("closure_of", "case"),
    [
        (reads_back, ("its closure waits for the GPU, as to read a value back", 0)),
        (fails_in_a_capture, ("its closure cannot be captured in a CUDA graph: OSError: no such library", 1)),
        (is_left_out, ("replayed, a test loss is", 1)),
    ],
)
@pytest.mark.parametrize("factors", [FACTORS_3, FACTORS_5], ids=len)
def test_what_cannot_be_captured_is_evaluated_as_before(factors, closure_of, case, captures, monkeypatch):
    clock(monkeypatch)
    model, x = nn.Linear(5, 3), torch.randn(12, 5)
    optimizer, line, prev = probed(model, lambda model: model(x).square().mean())
    expected = losses_of_copies(model, prev, factors, lambda model: closure_of(model, x))
    before, auto = everything(model, optimizer), Auto()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message="(?!AutoLR evaluates the candidates one after another, since batch)"
        )
        warnings.filterwarnings("ignore", message="AutoLR evaluates the candidates one after another, since batch")
        for _ in range(2):
            assert auto.losses(model, line, factors, lambda: closure_of(model, x)).tolist() == expected
            assert_same(before, everything(model, optimizer))
    assert auto.name == ("inplace" if factors == FACTORS_3 else "streamed")
    says, begun = case
    assert f"; not graphed, since {says}" in repr(auto)
    assert len(captures) == begun


def test_several_micro_batches_are_not_captured(captures, monkeypatch):
    clock(monkeypatch)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    replay = Replay(model)
    for _ in range(2):
        replay.add(lambda: loss_of(model))
    auto = Auto()
    auto.losses(model, line, FACTORS_3, replay)
    assert "not graphed, since a graph cannot begin anew at each micro-batch" in repr(auto)
    assert not captures


@pytest.mark.parametrize(
    "why", ["few candidates", "not one GPU", "many parameters", "compiled", "deterministic", "several ranks"]
)
def test_a_graph_is_not_tried(why, captures, monkeypatch):
    clock(monkeypatch)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    if why == "not one GPU":
        monkeypatch.undo()
        captures = []
    elif why == "many parameters":
        monkeypatch.setattr("autolr_fast._machine.memory.SMALL", 0)
    elif why == "compiled":
        model.compile(backend="eager")
    elif why == "several ranks":
        monkeypatch.setattr(auto_module, "is_distributed", lambda: True)
    factors = FACTORS_3[:2] if why == "few candidates" else FACTORS_3
    auto = Auto()
    torch.use_deterministic_algorithms(why == "deterministic")
    try:
        auto.losses(model, line, factors, lambda: loss_of(model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert auto.name == ("streamed" if why == "many parameters" else "inplace")
    assert "graphed" not in repr(auto)
    assert not captures


def test_a_graph_is_not_tried_where_candidates_take_long(captures, monkeypatch):
    clock(monkeypatch, others=1.5)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    auto = Auto()
    auto.losses(model, line, FACTORS_3, lambda: loss_of(model))
    assert "graphed" not in repr(auto)
    assert not captures


def test_a_closure_that_can_no_longer_be_captured_goes_on_as_before(captures, monkeypatch):
    clock(monkeypatch)
    model, x = nn.Linear(5, 3), torch.randn(12, 5)
    _, line, _ = probed(model, lambda model: model(x).square().mean())
    auto = Auto()
    losses = auto.losses(model, line, FACTORS_3, lambda: model(x).square().mean())
    assert auto.name == "graphed"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            again = auto.losses(model, line, FACTORS_3, lambda: reads_back(model, x))
            assert torch.equal(again, 2 * losses)
    assert auto.name == "inplace"
    assert "; graphed failed: its closure cannot be captured in a CUDA graph: RuntimeError: aten::" in repr(auto)


def test_an_error_of_the_closure_is_its_own(monkeypatch):
    clock(monkeypatch)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    auto = Auto()
    auto.losses(model, line, FACTORS_3, lambda: loss_of(model))

    def closure():
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        auto.losses(model, line, FACTORS_3, closure)


def test_a_resumed_run_has_the_graph(monkeypatch, captures):
    clock(monkeypatch)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    auto, resumed = Auto(), Auto()
    auto.losses(model, line, FACTORS_3, lambda: loss_of(model))
    state = auto.state()
    resumed.check(state)
    resumed.load(state)
    assert (repr(resumed), resumed.name, resumed.state()) == (repr(auto), "graphed", state)
    monkeypatch.setattr("autolr_fast._evaluators.auto.seconds", None)
    for factors in (FACTORS_5, FACTORS_3[:1]):
        begun, asked = len(captures), (resumed, auto)
        losses = [each.losses(model, line, factors, lambda: loss_of(model)) for each in asked]
        assert torch.equal(*losses)
        assert len(captures) - begun == (2 if factors == FACTORS_5 else 0)
    resumed.load({**state, "state": ()})  # of a version without
    assert resumed.name == "inplace"


@pytest.mark.usefixtures("every_probe")
def test_a_training_ends_where_one_in_place_ends(monkeypatch):
    clock(monkeypatch)
    ends = []
    for evaluator in ("auto", "inplace"):
        torch.manual_seed(0)
        model, loss_of = problem("convnet")
        optimizer = sgd(model, momentum=0.9)
        options = {"total_steps": 40, "calibration_steps": 4, "probe_every_steps": 3, "rule": Rule(FACTORS_3)}
        scheduler = AutoLR(optimizer, model, evaluator=evaluator, **options)
        for _ in range(20):
            optimizer.zero_grad()
            scheduler.loss(lambda model=model, loss_of=loss_of: loss_of(model)).backward()
            optimizer.step()
            scheduler.step()
        ends.append(everything(model, optimizer))
        assert scheduler.last_probe.evaluator == ("graphed" if evaluator == "auto" else evaluator)
    assert_same(*ends)
