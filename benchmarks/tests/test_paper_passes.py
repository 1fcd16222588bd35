"""The ways to run forward and backward, against the eager one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks.paper import passes, train
from benchmarks.paper.data import Batches
from benchmarks.paper.models import ResNet18
from benchmarks.paper.passes import Captured, Passes
from tests.tape import Tape

from .test_paper_train import assert_same_run, rows_of, without_cost, write_shard

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def on_cpu(monkeypatch):
    """Capture on the CPU; the list has a tape for each capture."""
    tapes = []

    def record(work, device):
        for _ in range(passes._WARM_UP):
            work()
        with Tape() as tape:
            loss = work()
        tapes.append(tape)

        def replay():
            with torch.autograd._unsafe_preserve_version_counter(loss):  # autograd knows of no replay
                tape.replay()
            return loss

        return replay

    monkeypatch.setattr(passes, "record", record)
    return tapes


def batches(count, size=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 16, 16, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def state_of(model):
    return [*model.parameters(), *model.buffers()]


def assert_equal(got, expected):
    assert len(got) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def train_by(steps, model, data):
    """Train by plain SGD; return all losses, and all gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], []
    for batch in data:
        loss = steps.begin(*batch)()
        steps.backward(loss)
        losses.append(loss.detach().clone())
        gradients += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    return losses, gradients


# The passes of a step


def test_replays_are_the_passes_of_each_batch(on_cpu):
    model = ResNet18(3, width=2)
    twin, data = copy.deepcopy(model), batches(4)
    captured = Captured(model, *batches(5)[-1], replays_probes=True)
    assert len(on_cpu) == 2
    assert_equal(state_of(model), state_of(twin))  # captures are not noticed
    got, expected = train_by(captured, model, data), train_by(Passes(twin), twin, data)
    for each, wanted in zip(got, expected, strict=True):
        assert_equal(each, wanted)
    assert_equal(state_of(model), state_of(twin))
    assert len({loss.item() for loss in expected[0]}) == 4


@pytest.mark.parametrize("replays", [True, False])
def test_later_calls_are_forwards_at_the_parameters_of_then(on_cpu, replays):
    model = ResNet18(3, width=2)
    twin, ((x, y), other) = copy.deepcopy(model), batches(2)
    closure = Captured(model, *other, replays_probes=replays).begin(x, y)
    closure()
    F.cross_entropy(twin(x), y).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for _ in range(2):
        with torch.no_grad():
            for parameter in state_of(model)[:3] + state_of(twin)[:3]:
                parameter.mul_(1.5)
            assert torch.equal(closure(), F.cross_entropy(twin(x), y))
    assert_equal(state_of(model), state_of(twin))
    assert_equal(gradients, [parameter.grad for parameter in twin.parameters()])  # of the training alone
    assert closure().requires_grad  # what AutoLR differentiates, such as a fresh gradient


def test_compiled_passes_are_near_the_eager_ones():
    """With torch's own kernels: to compile those of C++ takes a minute even of a few layers."""
    nn = torch.nn
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    twin, data = copy.deepcopy(model), batches(3)
    got = train_by(Passes(model, torch.compile(model, backend="aot_eager")), model, data)
    expected = train_by(Passes(twin), twin, data)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state_of(model), state_of(twin), rtol=1e-4, atol=1e-5)


# Whole runs


@pytest.fixture
def arguments(tmp_path):
    write_shard(tmp_path / "train-0.parquet", 40, seed=1)
    write_shard(tmp_path / "test-0.parquet", 10, seed=2)

    def build(out, *more):
        places = ["--data", str(tmp_path), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / out)]
        sizes = ["--width", "2", "--batch-size", "8", "--validation", "8", "--epochs", "7", "--device", "cpu"]
        return [*places, *sizes, *more]

    return build


@pytest.mark.parametrize(
    ("more", "captures"),
    [
        (["--scheduler", "cosine", "--evaluator", "inplace"], 2),
        (["--scheduler", "paper", "--evaluator", "inplace"], 2),
        (["--scheduler", "auto", "--evaluator", "inplace", "--momentum", "0.9"], 2),
        (["--scheduler", "auto", "--evaluator", "streamed"], 1),
        (["--scheduler", "paper", "--evaluator", "inplace", "--direction", "gradient"], 2),
        (["--scheduler", "paper", "--evaluator", "inplace", "--score-batch-size", "12", "--every", "4"], 2),
    ],
)
def test_a_captured_run_is_the_eager_one(arguments, tmp_path, on_cpu, more, captures):
    for step in ("eager", "captured"):
        train.main(arguments(step, *more, "--step", step))
    assert len(on_cpu) == captures
    assert_same_run(tmp_path / "captured", tmp_path / "eager")
    assert len([row for row in rows_of(tmp_path / "eager") if row["kind"] == "step"]) == 28


def test_an_interrupted_captured_run_goes_on_bit_for_bit(arguments, tmp_path, on_cpu):
    more = ["--scheduler", "auto", "--evaluator", "inplace", "--step", "captured"]
    train.main(arguments("whole", *more))
    train.main(arguments("parts", *more, "--steps", "13"))
    train.main(arguments("parts", *more))
    parts, whole = (without_cost(rows_of(tmp_path / out)) for out in ("parts", "whole"))
    assert [row for row in parts if row["step"] != 13 or row["kind"] == "step"] == whole
    assert len(on_cpu) == 6


def test_a_compiled_run_is_near_the_eager_one(arguments, tmp_path, monkeypatch):
    """Its graphs are what is compiled here, and their kernels torch's own: those of C++ take minutes."""
    compiled = []

    def compiles(model):
        compiled.append(model)
        return compile_(model, backend="aot_eager")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compiles)
    for step in ("eager", "compiled"):
        more = ["--scheduler", "paper", "--evaluator", "inplace", "--every", "3", "--steps", "6"]
        train.main(arguments(step, *more, "--step", step))
    assert len(compiled) == 1
    losses = {step: [row["loss"] for row in rows_of(tmp_path / step)[1:]] for step in ("eager", "compiled")}
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-4)


def test_a_capture_asks_for_a_gpu(arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        train.main(arguments("run", "--step", "captured"))
    assert refused.value.code == 2
    assert "--step captured: cpu has no CUDA graphs; use --step eager" in capsys.readouterr().err


# On a GPU


@needs_gpu
def test_a_graph_of_a_gpu_replays_the_passes():
    model = ResNet18(3, width=8).cuda()
    twin, data = copy.deepcopy(model), [(x.cuda(), y.cuda()) for x, y in batches(4)]
    got = train_by(Captured(model, *data[-1], replays_probes=True), model, data)
    expected = train_by(Passes(twin), twin, data)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@needs_gpu
def test_a_batch_does_not_wait_for_the_gpu():
    images = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8, device="cuda")
    source = Batches(images, torch.arange(64, device="cuda"), 8, seed=0, augment=True)
    source.batch(0)  # brings the order of the epoch
    torch.cuda.set_sync_debug_mode("error")
    try:
        source.batch(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
