"""What only a GPU shows; the other modules run on one too: ``python -m pytest --device cuda tests``."""

import copy
import itertools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import FACTORS_3, FACTORS_5, FACTORS_7, Auto, AutoLR, InPlace, Rule, Stacked
from autolr_fast import _ops as ops
from autolr_fast._evaluators import EVALUATORS
from autolr_fast._steps.host_memory import Away, HostMemory, here, saved

from .helpers import assert_same, everything, mlp, train_step
from .test_evaluators import probed, run_clock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICE = "cuda"


def classifier(*sizes, batch=64):
    """A perceptron, a batch, and their loss."""
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1]).to(DEVICE)
    x, y = torch.randn(batch, sizes[0], device=DEVICE), torch.randint(sizes[-1], (batch,), device=DEVICE)
    return model, lambda model: F.cross_entropy(model(x), y)


def train(model, loss_of, optimizer, steps, **options):
    scheduler = AutoLR(optimizer, model, total_steps=steps, **options)
    for _ in range(steps):
        train_step(model, optimizer, loss_of)
        scheduler.step(lambda: loss_of(model))
    return scheduler


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adamw-capturable": lambda p, lr: torch.optim.AdamW(p, lr=lr, capturable=True),
}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("evaluator", ["inplace", "streamed", "stacked", "graphed"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_tensor_lr_never_waits_for_the_gpu(optimizer, evaluator):
    model, loss_of = classifier(20, 32, 10)
    optimizer = OPTIMIZERS[optimizer](model.parameters(), torch.tensor(1e-3, device=DEVICE))
    scheduler = AutoLR(
        optimizer, model, total_steps=100, calibration_steps=3, probe_every_steps=5, evaluator=evaluator
    )
    for step in range(1, 61):
        mode = "default" if step < 20 else "error"
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss = scheduler.loss(lambda: loss_of(model))
            torch.cuda.set_sync_debug_mode("default")
            loss.backward()
            optimizer.step()  # torch's own may wait
            torch.cuda.set_sync_debug_mode(mode)
            scheduler.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert scheduler.last_probe.step == 50
    assert scheduler.last_probe.evaluator == evaluator
    assert optimizer.param_groups[0]["lr"].is_cuda


def test_a_float_lr_waits_once_a_probe():
    model, loss_of = classifier(20, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scheduler = AutoLR(
        optimizer, model, total_steps=100, calibration_steps=3, probe_every_steps=5, evaluator="inplace"
    )
    waits = []
    for _ in range(30):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message="called a synchronizing")
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("warn")
            loss = scheduler.loss(lambda: loss_of(model))
            torch.cuda.set_sync_debug_mode("default")
            loss.backward()
            optimizer.step()
            torch.cuda.set_sync_debug_mode("warn")
            scheduler.step()
            torch.cuda.set_sync_debug_mode("default")
        waits.append(len(caught))
    assert waits[10:] == [int(step % 5 == 0) for step in range(11, 31)]


@pytest.mark.parametrize("evaluator", [*EVALUATORS])
def test_a_probe_changes_nothing(evaluator):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 36, 10)
    ).to(DEVICE)
    x, y = torch.randn(16, 3, 8, 8, device=DEVICE), torch.randint(10, (16,), device=DEVICE)
    loss_of = lambda model: F.cross_entropy(model(x), y)  # noqa: E731
    optimizer, line, _ = probed(model, loss_of)
    before = everything(model, optimizer)
    expected = []
    for factor in FACTORS_5:
        candidate = copy.deepcopy(model)
        with torch.no_grad(), torch.random.fork_rng():
            line.writer(list(model.parameters()), [p[None] for p in candidate.parameters()])([factor])
            expected.append(loss_of(candidate))
    losses = EVALUATORS[evaluator]().losses(model, line, FACTORS_5, lambda: loss_of(model))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert losses.is_cuda
    assert_same(before, everything(model, optimizer))


def test_the_fastest_backend_serves():
    reasons = dict(ops.explain(DEVICE))
    assert ops.choose(DEVICE) == next(backend for backend in ("cuda", "triton", "torch") if not reasons[backend])


def test_triton_can_serve():
    pytest.importorskip("triton")
    assert not dict(ops.explain(DEVICE))["triton"]


def test_chunks_get_smaller_where_memory_runs_out():
    model, loss_of = classifier(2048, *([2048] * 8), 10)  # 128 MiB
    _, line, _ = probed(model, loss_of)
    expected = InPlace().losses(model, line, FACTORS_7, lambda: loss_of(model))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + (600 << 20)  # seven candidates are 900 MiB
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        losses = Stacked().losses(model, line, FACTORS_7, lambda: loss_of(model))
        assert torch.cuda.max_memory_allocated() <= allowed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_a_scaler_that_skips(dtype):
    model, plain = classifier(20, 64, 10)

    def loss_of(model):
        with torch.autocast(DEVICE, dtype=dtype):
            return plain(model)

    first = loss_of(model).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**60, growth_interval=10_000)
    scheduler = AutoLR(optimizer, model, total_steps=150)
    probed_at = []
    for _ in range(180):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step(lambda: loss_of(model))
        probed_at.append(scheduler.last_probe.step if scheduler.last_probe else 0)
        if scheduler.last_epoch == 150:
            break
    skipped = probed_at.count(0)
    assert (skipped > 10) == (dtype == torch.float16)
    assert probed_at[skipped] == 1
    assert loss_of(model).item() < 0.1 * first


@pytest.mark.filterwarnings("ignore")  # inductor's
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("what", ["model", "loss"])
def test_compiled_models_run_compiled(what, mode):
    pytest.importorskip("triton")
    model, loss_of = classifier(20, 64, 10)
    eager = copy.deepcopy(model)
    _, line, _ = probed(model, loss_of)
    _, eager_line, _ = probed(eager, loss_of)
    expected = InPlace().losses(eager, eager_line, FACTORS_5, lambda: loss_of(eager))
    if what == "model":
        compiled = torch.compile(model, mode=mode)
        closure = lambda: loss_of(compiled)  # noqa: E731
    else:
        compiled_loss = torch.compile(lambda: loss_of(model), mode=mode)
        closure = lambda: compiled_loss()  # noqa: E731
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):  # graphs are captured at the second and third
        losses = InPlace().losses(model, line, FACTORS_5, closure)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert_same(before, [p.detach().clone() for p in model.parameters()])


def test_another_stream_gives_the_same_training():
    levels = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        model, loss_of = classifier(20, 64, 10)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
            scheduler = train(model, loss_of, optimizer, 100, evaluator="inplace")
            levels.append((scheduler.level, loss_of(model).item()))
        torch.cuda.synchronize()
    assert levels[0] == levels[1]


@pytest.mark.parametrize("lr", [1e-5, 10.0])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_calibration_finds_the_rate_that_the_cpu_finds(kind, lr):
    make = {**OPTIMIZERS, "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr)}[kind]
    levels = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = mlp().cpu()
        x, y = torch.randn(64, 5, device="cpu").to(device), torch.randint(3, (64,), device="cpu").to(device)
        model.to(device)
        loss_of = lambda model, x=x, y=y: F.cross_entropy(model(x), y)  # noqa: E731
        levels.append(train(model, loss_of, make(model.parameters(), lr), 20, evaluator="inplace").level[0])
    assert levels[1] == pytest.approx(levels[0], rel=0.05)


def test_no_snapshot_is_kept_between_probes():
    model, loss_of = classifier(1024, *([2048] * 3), 10)  # 40 MiB
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    rule = Rule(window_steps=1)
    scheduler = AutoLR(optimizer, model, rule=rule, calibration_steps=3, probe_every_steps=5, evaluator="inplace")
    sizes = []
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        scheduler.step(lambda: loss_of(model))
        sizes.append(torch.cuda.memory_allocated())
    assert scheduler.last_probe.step == 20
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert max(sizes[5:]) - min(sizes[5:]) < parameters / 2


@pytest.mark.parametrize("evaluator", ["inplace", "streamed", "stacked", "graphed"])
@pytest.mark.parametrize("rule", [None, Rule(FACTORS_5, window_steps=(1, 2))], ids=["default", "rule"])
def test_a_training_with_snapshots_on_the_host_is_the_same(rule, evaluator):
    ends = []
    for where in ("device", "host"):
        model, loss_of = classifier(1024, *([2048] * 3), 10)  # 40 MiB: copies take longer than their launches
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        options = {"rule": rule, "calibration_steps": 3, "probe_every_steps": 5, "evaluator": evaluator}
        scheduler = train(model, loss_of, optimizer, 30, snapshots=where, **options)
        assert scheduler.last_probe.step == 15
        ends.append(everything(model, optimizer))
    assert_same(*ends)


def test_snapshots_on_the_host_take_no_memory_of_the_gpu():
    sizes, peaks = {}, {}
    for where in ("device", "host"):
        model, loss_of = classifier(1024, *([2048] * 3), 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        options = {"total_steps": 99, "calibration_steps": 3, "probe_every_steps": 5, "evaluator": "streamed"}
        scheduler = AutoLR(optimizer, model, snapshots=where, **options)
        sizes[where] = []
        for step in range(20):
            if step == 10:
                torch.cuda.reset_peak_memory_stats()
            train_step(model, optimizer, loss_of)
            assert step % 5 != 4 or scheduler._snapshots._kept
            sizes[where].append(torch.cuda.memory_allocated())
            scheduler.step(lambda model=model, loss_of=loss_of: loss_of(model))
        peaks[where] = torch.cuda.max_memory_allocated()
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        del model, loss_of, optimizer, scheduler
    assert max(sizes["host"][5:]) - min(sizes["host"][5:]) < parameters / 10
    assert max(sizes["device"][5:]) - min(sizes["device"][5:]) > 0.9 * parameters
    assert peaks["host"] < peaks["device"]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_copy_to_the_host_comes_between_what_writes_before_and_after():
    """On any stream, without a wait of the host; a state waits."""
    tensors = [torch.zeros(1 << 22, device=DEVICE), torch.zeros(64, 3, device=DEVICE).t()]
    memory = HostMemory()
    memory.put(tensors)  # pinned memory is there, and the streams
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)
        for tensor in tensors:
            tensor.fill_(1.0)
        kept = memory.put(tensors)
        is_early = not kept[0]._done.query()
        for tensor in tensors:
            tensor.fill_(2.0)
        back = [here(value) for value in kept]
        with torch.cuda.stream(other):
            elsewhere = [here(value) for value in kept]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_early, "the host waited for the copy"
    assert all(isinstance(value, Away) for value in kept)
    torch.cuda.synchronize()
    for values in (back, elsewhere, [saved(value) for value in kept]):
        assert all((value == 1.0).all() for value in values)
        assert [value.stride() for value in values] == [tensor.stride() for tensor in tensors]
    assert kept[0]._value.is_pinned()
    assert not saved(kept[0]).is_pinned()


def test_pinned_memory_is_not_given_out_again_before_it_was_read():
    memory = HostMemory()
    for value in range(20):
        tensor = torch.full((1 << 20,), float(value), device=DEVICE)
        torch.cuda._sleep(1_000_000)
        (kept,) = memory.put([tensor])
        back = here(kept)
        del kept, tensor
        (_next,) = memory.put([torch.full((1 << 20,), -1.0, device=DEVICE)])
        assert (back == value).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_each_gpu_copies_on_a_stream_of_its_own():
    tensors = [torch.full((1 << 20,), float(n), device=f"cuda:{n % 2}") for n in range(4)]
    memory = HostMemory()
    kept = memory.put(tensors)
    for tensor in tensors:
        tensor.fill_(-1.0)
    for number, value in enumerate(kept):
        assert value.device == tensors[number].device == here(value).device
        assert (here(value) == number).all()
    assert len(memory._streams) == 2


def reads_back(loss):
    return loss * (2.0 if loss.item() > 0 else 1.0)


def waits_beside(loss):
    torch.cuda.Event().synchronize()
    torch.cuda.synchronize()  # which torch does not warn of
    return loss


def forks(loss):
    """Leaves kernels on another stream, which the captured one never waits for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss.square()
    return loss


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("of_loss", [reads_back, waits_beside, forks])
def test_auto_goes_on_where_a_capture_fails(of_loss, monkeypatch):
    """On the same stream, with the same random numbers, an allocator outside of any capture, and no error left."""
    run_clock(monkeypatch, lambda evaluator: 0.1 if evaluator.name == "graphed" else 0.2)
    model, plain = classifier(20, 64, 10)
    model.append(nn.Dropout(0.3))
    loss_of = lambda model: of_loss(plain(model))  # noqa: E731
    optimizer, line, _ = probed(model, loss_of)
    before, stream = everything(model, optimizer), torch.cuda.current_stream()
    expected = InPlace().losses(model, line, FACTORS_3, lambda: loss_of(model))
    auto = Auto()
    for _ in range(2):
        assert torch.equal(auto.losses(model, line, FACTORS_3, lambda: loss_of(model)), expected)
        assert_same(before, everything(model, optimizer))
    assert auto.name == "inplace"
    assert "not graphed, since its closure" in repr(auto)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()  # raises if a capture were under way
    torch.randn(3, device=DEVICE).cpu().pin_memory()
    train_step(model, optimizer, plain)
    assert torch.equal(Auto().losses(model, line, FACTORS_3, lambda: plain(model)),
                       InPlace().losses(model, line, FACTORS_3, lambda: plain(model)))  # fmt: skip


def test_auto_takes_a_graph_that_is_faster():
    model, loss_of = classifier(64, *([64] * 40), 10)  # bound by its launches
    optimizer, line, _ = probed(model, loss_of)
    before, auto = everything(model, optimizer), Auto()
    for factors in (FACTORS_3, FACTORS_7, FACTORS_3[:1]):
        losses = auto.losses(model, line, factors, lambda: loss_of(model))
        expected = InPlace().losses(model, line, factors, lambda: loss_of(model))
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0.0)
        assert_same(before, everything(model, optimizer))
    assert auto.name == "graphed", repr(auto)


def test_a_capture_leaves_other_threads_alone():
    """A loader's thread pins memory, allocates and waits while graphs are captured."""
    model, loss_of = classifier(64, *([64] * 40), 10)
    _, line, _ = probed(model, loss_of)
    is_over, errors, rounds = threading.Event(), [], [0]

    def work():
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                while not is_over.is_set():
                    size = 1000 + 1000 * (rounds[0] % 50)
                    there = torch.empty(size).pin_memory().to(DEVICE, non_blocking=True)
                    assert there.sum().item() is not None
                    rounds[0] += 1
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        evaluator = EVALUATORS["graphed"]()
        expected = InPlace().losses(model, line, FACTORS_5, lambda: loss_of(model))
        for _ in range(50):
            losses = evaluator.losses(model, line, FACTORS_5, lambda: loss_of(model))
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0.0)
    finally:
        is_over.set()
        thread.join()
    assert not errors
    assert rounds[0] > 0
