"""A loop of Accelerate's has the rates of the loop that is written by hand."""

import contextlib
import itertools
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR

from .helpers import assert_same, everything, parameters_of

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState, PartialState

from examples import accelerate_loop

PAGE = (Path(__file__).parent.parent / "docs/accelerate.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
BATCHES = 21
SPOILT = 6  # of the batches, where a GradScaler skips
RANKS, PARTS, OF_RANKS = 2, 2, 32  # processes, micro-batches of their steps, and batches of all

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate's state is one for the whole process, and other tests have theirs."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


def network(dropout=0.3):
    torch.manual_seed(2)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 3)
    )


def batches(count=BATCHES, is_spoilt=False):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 12, 5, generator=generator)
    if is_spoilt:
        x[SPOILT] = torch.inf
    return TensorDataset(x, torch.randint(3, (count, 12), generator=generator))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def steps_of(parts):
    return -(-BATCHES // parts)  # the last step has what is left


def autolr(optimizer, model, steps, which):
    often = {"calibration_steps": 4, "probe_every_steps": 2, "probe_until_fraction": 1.0}
    return AutoLR(optimizer, model, total_steps=steps, micro_batches=which, **often)


def by_hand(parts=1, clip=None, precision="no", scaled=False, which="last"):
    """The loop without Accelerate; returns the rates after each batch, and what was trained."""
    model = network()
    optimizer = adamw(model)
    scheduler = autolr(optimizer, model, steps_of(parts), which)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    rates = []
    for index, (x, y) in enumerate(batches(is_spoilt=scaled)):
        torch.manual_seed(index)  # of dropout

        def closure(x=x, y=y):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = model(x)
            return F.cross_entropy(out.float(), y)

        loss = scheduler.loss(closure)
        scaler.scale(loss / parts).backward()
        if (index + 1) % parts == 0 or index + 1 == BATCHES:
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
    return rates, everything(model, optimizer), [probe.to_dict() for probe in scheduler.history]


def prepared(where, accelerator, steps, data, *, which="last", dropout=0.3):
    """Return what Accelerate prepared, the AutoLR, and what the loop calls step of."""
    model = network(dropout)
    optimizer = adamw(model)
    loader = DataLoader(data, batch_size=1, collate_fn=lambda rows: rows[0])
    if where in ("before", "with"):
        scheduler = autolr(optimizer, model, steps, which)
    if where == "with":
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        assert type(scheduler) is AutoLR
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if where in ("after", "wrapped"):
        scheduler = autolr(optimizer, model, steps, which)
    stepper = AcceleratedScheduler(scheduler, optimizer) if where == "wrapped" else scheduler
    return model, optimizer, loader, scheduler, stepper


def train(accelerator, objects, clip=None, first=0, last=BATCHES):
    model, optimizer, loader, scheduler, stepper = objects
    rates = []
    loader = accelerator.skip_first_batches(loader, first) if first else loader
    for index, (x, y) in enumerate(loader, start=first):
        torch.manual_seed(index)
        with accelerator.accumulate(model):
            loss = scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y))
            accelerator.backward(loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            stepper.step()
            optimizer.zero_grad()
        rates.append(scheduler.get_last_lr()[0])
        if index + 1 == last:
            break
    return rates


@pytest.mark.parametrize("where", ["before", "after", "with", "wrapped"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"parts": 2},
        {"parts": 2, "which": "all"},
        {"clip": 0.05},
        {"precision": "bf16"},
        {"scaled": True},
        {"parts": 2, "which": "all", "clip": 0.05, "precision": "bf16"},
    ],
    ids=["plain", "accumulate", "accumulate-all", "clip", "bf16", "scaler", "all-together"],
)
def test_a_loop_has_the_rates_of_one_by_hand(case, where):
    options = {"parts": 1, "clip": None, "precision": "no", "scaled": False, "which": "last", **case}
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=options["parts"], mixed_precision=options["precision"]
    )
    if options["scaled"]:  # as it has one of float16 on a GPU
        accelerator.scaler = torch.amp.GradScaler("cpu")
    data = batches(is_spoilt=options["scaled"])
    objects = prepared(where, accelerator, steps_of(options["parts"]), data, which=options["which"])
    rates = train(accelerator, objects, options["clip"])
    expected, trained, history = by_hand(**options)
    assert rates == expected
    assert_same(everything(accelerator.unwrap_model(objects[0]), objects[1].optimizer), trained)
    scheduler = objects[3]
    assert [probe.to_dict() for probe in scheduler.history] == history
    assert len(history) > 5
    assert scheduler.last_epoch == steps_of(options["parts"]) - options["scaled"]  # one was skipped


def test_a_run_that_is_saved_goes_on_as_if_it_had_not_been(tmp_path):
    def start():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        return accelerator, prepared("with", accelerator, steps_of(2), batches())

    accelerator, objects = start()
    expected = train(accelerator, objects)
    trained = everything(objects[0], objects[1].optimizer)

    accelerator, objects = start()
    rates = train(accelerator, objects, last=10)  # 5 steps: the window of the next probe is open
    accelerator.save_state(tmp_path)
    accelerator, objects = start()
    accelerator.load_state(tmp_path)
    assert objects[3].get_last_lr()[0] == rates[-1]
    rates += train(accelerator, objects, first=10)
    assert rates == expected
    assert_same(everything(objects[0], objects[1].optimizer), trained)


def test_the_page_runs_as_it_stands(tmp_path):
    (loop, checkpoint), model = PYTHON.findall(PAGE), network()
    loader = DataLoader(batches(), batch_size=1, collate_fn=lambda rows: rows[0])
    scope = {"torch": torch, "model": model, "loss_fn": F.cross_entropy, "loader": loader, "epochs": 2}
    exec(loop, scope)
    scheduler, accelerator = scope["scheduler"], scope["accelerator"]
    assert scheduler.last_epoch == 2 * 6
    assert scheduler.last_probe.step >= 8  # each of these steps may be looked at
    assert scheduler.has_ended
    saved, weights = scheduler.get_last_lr(), parameters_of(model)
    save, load = checkpoint.splitlines()
    exec(save, scope | {"folder": tmp_path})
    accelerator.unwrap_model(scope["model"])[0].weight.data.zero_()
    scheduler._level.start_at(7.0)
    scheduler._level.apply(0)
    exec(load, scope | {"folder": tmp_path})
    assert scheduler.get_last_lr() == saved
    assert_same([*parameters_of(model).values()], [*weights.values()])


# Two processes


def at_rank(rank, directory):
    """Train with the loop, then with Accelerate's wrapper, which calls step once a process; run the example."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    os.environ |= {"WORLD_SIZE": f"{RANKS}", "LOCAL_WORLD_SIZE": f"{RANKS}", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    assert accelerator.num_processes == RANKS
    results = []
    for where in ("before", "after", "with", "wrapped"):
        steps = OF_RANKS // RANKS // PARTS
        objects = prepared(where, accelerator, steps, batches(OF_RANKS), which="all", dropout=0.0)
        rates = train(accelerator, objects)
        assert objects[3].last_epoch == steps
        results.append([rates, [probe.step for probe in objects[3].history], [*parameters_of(objects[0]).values()]])
    torch.save(results, f"{directory}/{rank}.pt")
    with open(f"{directory}/{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        accelerate_loop.main()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """The directory where each process left its results, and what the example printed there."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(at_rank, (str(directory),), nprocs=RANKS)
    return directory


def test_two_processes_have_the_rates_of_one_with_all_their_batches(of_two_processes):
    of_ranks = [torch.load(of_two_processes / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    expected, parameters = of_one_process()
    for rates, probed, trained in itertools.chain(*of_ranks):
        assert rates == of_ranks[0][0][0]
        assert probed == of_ranks[0][0][1]
        assert probed[:2] == [1, 2]
        assert_same(trained, of_ranks[0][0][2])
        assert rates == pytest.approx(expected, rel=1e-3)
        for one, other in zip(trained, parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_example_on_two_processes(of_two_processes):
    printed = (of_two_processes / "0.txt").read_text()
    first, second, accuracy = re.findall(r"\[(\S+), (\S+)\], test accuracy (\S+)%", printed)[0]
    assert float(first) == float(second) > 1e-4  # from 1e-6
    assert float(accuracy) > 90
    assert not (of_two_processes / "1.txt").read_text()


def of_one_process():
    """The same steps by hand: each micro-batch is the batches of all ranks."""
    model, rates = network(dropout=0.0), []
    optimizer = adamw(model)
    scheduler = autolr(optimizer, model, OF_RANKS // RANKS // PARTS, "all")
    x, y = (part.unflatten(0, (-1, PARTS, RANKS)) for part in batches(OF_RANKS).tensors)
    for step in zip(x, y, strict=True):
        for parts in zip(*step, strict=True):
            many, labels = (part.flatten(0, 1) for part in parts)
            loss = scheduler.loss(lambda x=many, y=labels: F.cross_entropy(model(x), y))
            (loss / PARTS).backward()
            rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
        rates[-1] = scheduler.get_last_lr()[0]
        optimizer.zero_grad()
    return rates, [*parameters_of(model).values()]
