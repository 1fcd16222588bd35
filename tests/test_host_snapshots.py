"""Snapshots in host memory, on a simulated GPU that copies late; ``test_gpu.py`` has a real one."""

import copy
import io

import pytest
import torch
from torch import nn

from autolr_fast import FACTORS_5, AutoLR, Rule
from autolr_fast._evaluators import EvaluatorError, resolve_evaluator
from autolr_fast._optimizers import Optimizers
from autolr_fast._steps import ProbeSchedule, Snapshots, StepCounter, StepLine, host_memory, lines
from autolr_fast._steps.host_memory import Away, HostMemory, here

from .helpers import MODELS, NAMED, OPTIMIZERS, assert_same, everything, mlp, problem, sgd, train_step
from .late_copies import LateGpu, Stream
from .test_evaluators import probed

pytestmark = pytest.mark.cpu  # which the simulated GPU is


@pytest.fixture
def gpu(monkeypatch):
    """The one that each HostMemory finds."""
    simulated = LateGpu()
    monkeypatch.setattr(host_memory, "Gpu", lambda: simulated)
    return simulated


def train(model, optimizer, loss_of, steps=25, replays=True, **options):
    scheduler = AutoLR(optimizer, model, **{"total_steps": 90, "probe_every_steps": 4, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        loss = scheduler.loss(lambda: loss_of(model)) if replays else loss_of(model)
        loss.backward()
        optimizer.step()
        scheduler.step(*([] if replays else [lambda: loss_of(model)]))
    return scheduler


def trained(kind, snapshots, lr=None, **options):
    torch.manual_seed(0)
    model, loss_of = problem(options.pop("name", "mlp"))
    make, arguments = OPTIMIZERS[kind]
    optimizer = make(model.parameters(), **{**arguments, **({} if lr is None else {"lr": lr})})
    scheduler = train(model, optimizer, loss_of, snapshots=snapshots, **options)
    return scheduler, everything(model, optimizer)


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("kind", ["sgd", "sgd-momentum", "adamw", "adam-foreach"])
@pytest.mark.parametrize("rule", [None, Rule(FACTORS_5, window_steps=(2, 1))], ids=["default", "rule"])
def test_a_training_ends_where_one_with_snapshots_on_the_device_ends(kind, rule, gpu):
    (expected, ends), (scheduler, own) = (
        trained(kind, where, rule=rule, evaluator="inplace") for where in ("device", "host")
    )
    assert_same(ends, own)
    assert scheduler.state_dict()["history"] == expected.state_dict()["history"]
    assert gpu.back
    assert gpu.streams == 1


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("evaluator", NAMED)
@pytest.mark.parametrize("has_end", [False, True], ids=["to-now", "to-a-point"])
def test_every_evaluator_reads_what_came_back(evaluator, name, has_end, gpu):
    """What it refuses, it refuses alike."""
    model, loss_of = problem(name)
    optimizer, line, _ = probed(model, loss_of)
    prev = dict(zip(line.parameters, line._prev, strict=True))
    end = {parameter: torch.lerp(value, parameter.detach(), 0.7) for parameter, value in prev.items()}
    memory, before = HostMemory(), everything(model, optimizer)
    seen = []
    for keep in (
        lambda values: values,
        lambda values: dict(zip(values, memory.put([*values.values()]), strict=True)),
    ):
        line = StepLine(keep(prev), {}, window=1, end=keep(end) if has_end else None)
        try:
            seen.append(
                resolve_evaluator(evaluator).losses(model, line, FACTORS_5, lambda: loss_of(model)).tolist()
            )
        except EvaluatorError as error:
            seen.append(error.reason)
        assert_same(before, everything(model, optimizer))
    assert seen[0] == seen[1]
    assert isinstance(seen[0], str) or len(set(seen[0])) == len(FACTORS_5)
    assert isinstance(seen[0], str) or len(gpu.back) >= (1 + has_end) * len(prev)


@pytest.mark.parametrize("has_end", [False, True], ids=["to-now", "to-a-point"])
@pytest.mark.parametrize(
    ("evaluator", "most"), [("inplace", 20), ("graphed", 20), ("stacked", 20), ("streamed", 16)]
)
def test_no_second_copy_of_the_model_comes_back(evaluator, most, has_end, gpu, monkeypatch):
    """An evaluator needs one parameter besides, or a part of 16 MiB, here of 20 elements; of both ends."""
    monkeypatch.setattr(lines, "SMALL", 4 * 20)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))  # 120 elements
    x = torch.randn(3, 4)
    put = HostMemory().put
    prev = dict(zip(model.parameters(), put([p.detach() + 0.1 for p in model.parameters()]), strict=True))
    end = dict(zip(model.parameters(), put([p.detach() for p in model.parameters()]), strict=True))
    line = StepLine(prev, {}, 1, end if has_end else None)
    gpu.most_back = 0
    resolve_evaluator(evaluator).losses(model, line, FACTORS_5, lambda: model(x).square().mean())
    assert 0 < gpu.most_back <= most * (1 + has_end)
    gpu.most_back = 0
    line.squares()
    assert 0 < gpu.most_back <= 32  # one parameter, while the next one comes


@pytest.mark.parametrize("broken", ["wait_stream", "wait_event"])
def test_a_wait_that_is_left_out_shows(broken, gpu, monkeypatch):
    """Of the simulation: without either wait the trainings above would end elsewhere."""
    monkeypatch.setattr(Stream, broken, lambda self, other: None)
    parameter = nn.Parameter(torch.ones(3))
    (kept,) = HostMemory().put([parameter.detach()])
    with torch.no_grad():
        parameter.add_(1.0)  # as the optimizer does
    assert not torch.equal(here(kept), torch.ones(3))


def test_another_stream_waits_for_the_copy(gpu):
    """The current stream of a probe need not be that of the step."""
    parameter = nn.Parameter(torch.ones(3))
    (kept,) = HostMemory().put([parameter.detach()])
    gpu.current = Stream(gpu)
    assert torch.equal(here(kept), torch.ones(3))


def test_values_that_are_kept_are_of_their_moment_and_go_one_by_one(gpu):
    tensors = [
        torch.randn(3, 5),
        torch.randn(4, 6).t(),
        torch.randn(()),
        torch.empty(0, 2),
        torch.randn(5).bfloat16(),
    ]
    expected = [tensor.clone() for tensor in tensors]
    kept = HostMemory().put(tensors)
    for tensor in tensors:
        tensor.zero_()
    for value, tensor, was in zip(kept, tensors, expected, strict=True):
        assert (value.shape, value.dtype, value.device) == (was.shape, was.dtype, was.device)
        assert torch.equal(here(value), was)
        assert here(value).stride() == tensor.stride()
    assert gpu.host_waits == 0


def test_what_is_not_on_a_gpu_stays_where_it_is(gpu, monkeypatch):
    """Such as a state on the CPU, or a class that copies itself."""

    class Own(torch.Tensor):
        pass

    plain, own = torch.ones(2), torch.ones(2).as_subclass(Own)
    kept = HostMemory().put([plain, own])
    assert isinstance(kept[0], Away)
    assert type(kept[1]) is Own
    monkeypatch.setattr(LateGpu, "is_one", lambda self, device: False)
    (kept,) = HostMemory().put([plain])
    plain.zero_()
    assert kept.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("every_probe")
def test_the_host_waits_for_no_copy_but_those_of_a_state(gpu):
    scheduler, _ = trained("adamw", "host", steps=23)
    assert scheduler.last_probe.step == 20
    assert gpu.host_waits == 0
    state = scheduler.state_dict()
    values = [value for _, window, _ in state["snapshots"]["windows"] for value in window]
    assert values
    assert gpu.host_waits == len(values)


@pytest.mark.parametrize("lr", [1e-6, 30.0])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_that_are_taken_again_end_where_they_end_on_the_device(kind, lr, gpu):
    (expected, ends), (scheduler, own) = (trained(kind, where, lr, steps=6) for where in ("device", "host"))
    assert expected.history[0].retaken is not None
    assert [probe.retaken for probe in scheduler.history] == [probe.retaken for probe in expected.history]
    assert_same(ends, own)


def test_what_is_kept_from_between_goes_with_steps_that_are_taken_again(gpu):
    parameter, frozen = nn.Parameter(torch.randn(200)), nn.Parameter(torch.randn(3))
    optimizers = Optimizers(torch.optim.SGD([parameter, frozen], lr=0.1))
    start, between, end = torch.randn(200), torch.randn(200), parameter.detach().clone()
    ends = []
    for memory in (None, HostMemory()):
        with torch.no_grad():
            parameter.copy_(end)
        snapshots = Snapshots(optimizers, ProbeSchedule(1, 0, (2, 1)), memory)
        for step, values in ((1, [start]), (2, [between, frozen.detach()])):
            snapshots._kept[step] = dict(zip((parameter, frozen), snapshots._memory.put(values), strict=False))
        line = snapshots.line(2, 3, {})
        snapshots.retake(line, 0.25, steps=3)
        ends.append([parameter.detach().clone(), *map(here, snapshots._kept[2].values())])
    assert_same(*ends)
    assert isinstance(snapshots._kept[2][parameter], Away)
    torch.testing.assert_close(ends[1][1], start + 0.25 * (between - start))


class KeepsMaster(torch.optim.SGD):
    """Steps from a copy of the weights in its state, as for training in 16 bits."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.double()
                state["master"].sub_(parameter.grad.double(), alpha=group["lr"])
                parameter.copy_(state["master"])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 3.0])
def test_weights_in_the_state_of_an_optimizer_come_back_too(ratio, gpu):
    ends = []
    for memory in (None, HostMemory()):
        torch.manual_seed(0)
        model, loss_of = problem("mlp")
        optimizer = KeepsMaster(model.parameters(), lr=0.1)
        optimizers = Optimizers(optimizer)
        snapshots = Snapshots(optimizers, ProbeSchedule(None, 9, (2,)), memory)
        counter = StepCounter(optimizers, before_step=snapshots.keep)
        for _ in range(3):
            train_step(model, optimizer, loss_of)
        weights = [value for named in snapshots._kept_weights[1].values() for value in named.values()]
        assert len(weights) == 4
        assert {type(value) for value in weights} == {torch.Tensor if memory is None else Away}
        assert snapshots.retake(snapshots.line(2, counter.steps, {}), ratio, counter.steps) == (ratio, "")
        between = [here(value) for named in snapshots._kept_weights[2].values() for value in named.values()]
        ends.append([*everything(model, optimizer), *between])
    assert_same(*ends)
    assert gpu.back


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("after", [3, 20, 23, 24])
@pytest.mark.parametrize("is_on_host_later", [True, False])
def test_a_resumed_training_ends_where_it_would_have(after, is_on_host_later, gpu):
    """Also where snapshots are kept elsewhere from then on: a state is one of both."""
    torch.manual_seed(0)
    model, loss_of = problem("mlp")
    optimizer = sgd(model, momentum=0.9)
    scheduler = train(model, optimizer, loss_of, steps=after, snapshots="host")
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], saved)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    values = [value for _, window, _ in states[2]["snapshots"]["windows"] for value in window]
    assert all(type(value) is torch.Tensor and value.is_cpu for value in values)
    again = copy.deepcopy(model)
    resumed = sgd(again, momentum=0.9)
    where = "host" if is_on_host_later else "device"
    follower = AutoLR(resumed, again, total_steps=90, probe_every_steps=4, snapshots=where)
    for each, state in zip((again, resumed, follower), states, strict=True):
        each.load_state_dict(state)
    kept = [value for kept in follower._snapshots._kept.values() for value in kept.values()]
    assert len(kept) == 4
    assert all(isinstance(value, Away) == is_on_host_later for value in kept)
    for each, optimizer_of, scheduler_of in ((model, optimizer, scheduler), (again, resumed, follower)):
        torch.manual_seed(1)
        for _ in range(15):
            optimizer_of.zero_grad()
            scheduler_of.loss(lambda each=each: loss_of(each)).backward()
            optimizer_of.step()
            scheduler_of.step()
    assert follower.last_probe.step > after
    assert_same(everything(model, optimizer), everything(again, resumed))


def test_nothing_is_kept_between_probes(gpu):
    scheduler, _ = trained("sgd", "host", steps=36, probe_every_steps=12)
    assert scheduler.last_probe.step == 36
    assert not scheduler._snapshots._kept


def test_a_parameter_that_changed_is_refused(gpu):
    model = mlp()
    optimizer = sgd(model)
    scheduler = AutoLR(optimizer, model, snapshots="host", calibration_steps=0, probe_every_steps=1, rule=Rule())
    x = torch.randn(4, 5)
    scheduler.loss(lambda: model(x).square().mean()).backward()
    optimizer.step()
    model.double()
    with pytest.raises(RuntimeError, match=r"was \(\[16, 5\], torch.float32.*float64.*convert the model before"):
        scheduler.step(lambda: model(x.double()).square().mean())


@pytest.mark.parametrize(
    ("snapshots", "says"),
    [
        ("host", "snapshots='host' spares a GPU's memory, and the parameters are on cpu: leave snapshots='device'"),
        ("disk", "snapshots='disk': expected 'device' or 'host'"),
        (None, "snapshots=None: expected 'device' or 'host'"),
    ],
)
def test_what_cannot_be_meant_is_refused(snapshots, says):
    model = mlp()
    optimizer = sgd(model)
    groups = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=says):
        AutoLR(optimizer, model, snapshots=snapshots)
    assert [{**group, "params": 0} for group in optimizer.param_groups] == [{**g, "params": 0} for g in groups]
    AutoLR.paper(optimizer, model, snapshots="device")
