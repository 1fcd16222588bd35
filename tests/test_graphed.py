"""What the other tests of evaluators, which run Graphed on a simulated graph, do not show of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autolr_fast import FACTORS_5, AutoLR, Graphed, InPlace
from autolr_fast._evaluators import EvaluatorError, graphed
from autolr_fast._steps import StepLine

from .helpers import MODELS, assert_same, everything, losses_of_copies, problem, sgd, train_step
from .test_evaluators import probed


@pytest.mark.parametrize("name", sorted(MODELS))
def test_losses_equal_deep_copies_bitwise(name):
    model, loss_of = problem(name)
    _, line, prev = probed(model, loss_of)
    expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
    assert Graphed().losses(model, line, FACTORS_5, lambda: loss_of(model)).tolist() == expected
    assert len(set(expected)) == len(FACTORS_5)


def test_closure_runs_once_a_probe_and_twice_at_the_first():
    model, loss_of = problem("convnet")
    _, line, _ = probed(model, loss_of)
    evaluator, calls = Graphed(), []

    def closure():
        calls.append(1)
        return loss_of(model)

    evaluator.losses(model, line, FACTORS_5, closure)
    assert len(calls) == 2
    evaluator.losses(model, line, FACTORS_5, closure)
    assert len(calls) == 3


def test_each_probe_reads_its_own_batch():
    model, evaluator = nn.Linear(5, 3), Graphed()
    batches = [torch.randn(12, 5) for _ in range(3)]
    _, line, _ = probed(model, lambda model: model(batches[0]).square().mean())
    for x in batches:
        losses = evaluator.losses(model, line, FACTORS_5, lambda x=x: model(x).square().mean())
        expected = InPlace().losses(model, line, FACTORS_5, lambda x=x: model(x).square().mean())
        assert torch.equal(losses, expected)


def test_training_ends_where_in_place_ends():
    ends = []
    for evaluator in ("graphed", "inplace"):
        model, loss_of = problem("convnet")
        optimizer = sgd(model, momentum=0.9)
        scheduler = AutoLR(
            optimizer, model, probe_every_steps=2, calibration_steps=4, total_steps=12, evaluator=evaluator
        )
        for _ in range(12):
            train_step(model, optimizer, loss_of)
            scheduler.step(lambda model=model, loss_of=loss_of: loss_of(model))
        assert scheduler.last_probe.evaluator == evaluator
        ends.append(everything(model, optimizer))
    assert_same(*ends)


@pytest.mark.cpu  # what the simulation says
@pytest.mark.parametrize(
    ("closure_of", "says"),
    [
        (
            lambda model, x: model(x).sum() * (2.0 if model(x).sum() > 0 else 1.0),
            "not permitted when stream is capt",
        ),
        (lambda model, x: model(x).sum() + float(model.weight.detach().numpy().sum()), "outside of the graph"),
    ],
    ids=["control-flow", "numpy"],
)
def test_what_cannot_be_captured_is_refused(closure_of, says):
    model, x = nn.Linear(5, 3), torch.randn(12, 5)
    optimizer, line, _ = probed(model, lambda model: model(x).square().mean())
    before = everything(model, optimizer)
    with pytest.raises(EvaluatorError, match=says):
        Graphed().losses(model, line, FACTORS_5, lambda: closure_of(model, x))
    assert_same(before, everything(model, optimizer))


def test_the_simulation_is_of_the_cpu_alone():
    with torch.device("meta"):  # stands for any other
        model = nn.Linear(5, 3)
    line = StepLine({parameter: parameter.detach() for parameter in model.parameters()}, {}, window=1)
    with pytest.raises(EvaluatorError, match="parameters are on meta, not on one CUDA GPU"):
        Graphed().losses(model, line, FACTORS_5, lambda: model(torch.ones(2, 5, device="meta")).sum())


@pytest.mark.cpu
def test_needs_a_gpu(monkeypatch):
    monkeypatch.undo()  # no simulation
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    with pytest.raises(EvaluatorError, match="parameters are on cpu, not on one CUDA GPU.*'inplace' works"):
        Graphed().losses(model, line, FACTORS_5, lambda: loss_of(model))


class State:
    """A generator's, that a failed capture has made useless."""

    def __init__(self, spoilt=False):
        self.spoilt = spoilt

    def clone_state(self):
        return State(self.spoilt)


class Generator:
    def __init__(self):
        self.state = State()

    def graphsafe_get_state(self):
        return self.state

    def graphsafe_set_state(self, state):
        self.state = state


@pytest.mark.cpu
@pytest.mark.parametrize("ends", [True, False], ids=["ends", "end-raises"])
@pytest.mark.parametrize("fails", [RuntimeError, TypeError, KeyboardInterrupt])
def test_a_capture_that_fails_is_ended_and_leaves_the_generator_as_it_was(fails, ends, monkeypatch):
    generator, calls = Generator(), []
    is_allocating = [True]

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"
            calls.append("begin")

        def capture_end(self):
            generator.state.spoilt = True
            calls.append("end")
            if not ends:
                raise RuntimeError("operation failed due to a previous error during capture")
            is_allocating[0] = False

        def reset(self):
            calls.append("reset")

    def end_allocating(device, pool):
        if not is_allocating[0]:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        is_allocating[0] = False

    class Stream:
        device = torch.device("cpu", 0)

        def __init__(self, device):
            pass

        def wait_stream(self, other):
            calls.append("wait")

    class Current:
        def __init__(self, stream):
            pass

        def __enter__(self):
            calls.append("enter")

        def __exit__(self, *exc_info):
            calls.append("leave")

    cuda = SimpleNamespace(
        default_generators=[generator],
        Stream=Stream,
        CUDAGraph=Graph,
        stream=Current,
        current_stream=lambda device: None,
        graph_pool_handle=lambda: (0, 1),
    )
    zeros = torch.zeros

    def launched(*args, **kwargs):
        calls.append("launch")
        zeros(*args, **kwargs)
        raise RuntimeError("what a library had left")  # as the first launch does that looks

    monkeypatch.setattr(graphed.torch, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating, raising=False)
    monkeypatch.setattr(torch, "zeros", launched)
    recorder, state = graphed.Recorder(SimpleNamespace(index=0)), generator.state

    def captured():
        raise fails("operation not permitted when stream is capturing")

    with pytest.raises(fails, match="not permitted"), recorder:
        recorder.record(captured)
    assert calls == ["wait", "enter", "begin", "end", "reset", "leave", "launch"]
    assert not is_allocating[0]
    assert generator.state is state
    assert not state.spoilt


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", sorted(MODELS))
def test_on_a_gpu(name):
    model, loss_of = problem(name)
    model.cuda()
    x = MODELS[name][1]().cuda()
    loss_of = lambda model: model(x).tanh().square().mean()  # noqa: E731
    optimizer, line, _ = probed(model, loss_of)
    before, evaluator = everything(model, optimizer), Graphed()
    for _ in range(3):
        losses = evaluator.losses(model, line, FACTORS_5, lambda: loss_of(model))
        expected = InPlace().losses(model, line, FACTORS_5, lambda: loss_of(model))
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0.0)
        assert_same(before, everything(model, optimizer))
    with pytest.raises(EvaluatorError, match="cannot be captured"):
        evaluator.losses(model, line, FACTORS_5, lambda: loss_of(model) * loss_of(model).item())
    assert torch.equal(InPlace().losses(model, line, FACTORS_5, lambda: loss_of(model)), expected)
    torch.rand(1, device="cuda")  # raises if the generator was left in a capture
