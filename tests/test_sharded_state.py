"""Two processes with gloo: what one rank saves and all load, and what torch.distributed.checkpoint saves."""

import copy
import warnings
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from autolr_fast import AutoLR
from autolr_fast._steps import host_memory

from .helpers import mlp, of_each_rank
from .late_copies import LateGpu

RANKS, STEPS = 2, 34
EARLY, LATE = 3, 25  # steps after which training is interrupted: in calibration, and in the window of a later probe
WAYS = ("by rank 0", "by each rank", "checkpoint, fresh", "checkpoint, live")
CASES = [("fsdp2", "by rank 0", EARLY), *((wrap, way, LATE) for wrap in ("ddp", "fsdp2") for way in WAYS)]
CASES += [("fsdp2, host", "by each rank", LATE), ("fsdp2, host", "checkpoint, fresh", LATE)]

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def start(wrap):
    torch.manual_seed(0)
    model = mlp()
    if wrap.startswith("fsdp2"):
        fully_shard(model[0])
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    snapshots = "host" if wrap.endswith("host") else "device"
    return model, optimizer, AutoLR(optimizer, model, total_steps=64, snapshots=snapshots)


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def train(parts, steps, rank):
    model, optimizer, scheduler = parts
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x, y = torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        scheduler.loss(partial(loss_of, model, x, y)).backward()
        optimizer.step()
        scheduler.step()


def handed_on(scheduler, way, directory, rank, live):
    """The state of a scheduler as another one gets it."""
    state = scheduler.state_dict()
    if way in {"by rank 0", "by each rank"}:
        path = f"{directory}/{0 if way == 'by rank 0' else rank}.pt"
        if way == "by each rank" or rank == 0:
            torch.save(state, path)
        dist.barrier()
        return torch.load(path, weights_only=True)
    dcp.save({"scheduler": state}, checkpoint_id=f"{directory}/dcp")
    state = {"scheduler": live.state_dict()}
    dcp.load(state, checkpoint_id=f"{directory}/dcp")
    return state["scheduler"]


def interrupted(wrap, way, at, rank, directory):
    """The probed steps, last rates and parameters of a training that goes on from a state, and what was told."""
    parts = start(wrap)
    if at < STEPS:
        train(parts, range(at), rank)
        states = copy.deepcopy(get_state_dict(*parts[:2]))
        goes_on = start(wrap)
        if way == "checkpoint, live":
            train(goes_on, range(18), rank)
        if way != "by each rank":
            parts[2].share_losses()
        state = handed_on(parts[2], way, directory, rank, live=goes_on[2])
        if way == "checkpoint, live":
            goes_on = start(wrap)
        set_state_dict(*goes_on[:2], model_state_dict=states[0], optim_state_dict=states[1])
        parts = goes_on
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parts[2].load_state_dict(state)
            train(parts, range(at, STEPS), rank)
        told = [str(each.message) for each in caught if "shards of one rank" in str(each.message)]
    else:
        train(parts, range(STEPS), rank)
        told = []
    weights = [each.full_tensor() if wrap.startswith("fsdp2") else each for each in parts[0].parameters()]
    steps = [probe.step for probe in parts[2].history]
    return steps, parts[2].get_last_lr(), [each.detach().clone() for each in weights], told


def refused(use_orig_params, rank):
    model = FullyShardedDataParallel(mlp(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    said = []
    for given in (model, model.module):
        try:
            AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), given)
        except TypeError as error:
            said.append(str(error))
    return said


def alone(rank, directory):
    """What rank 0 is told that steps without the other."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/alone", rank=rank, world_size=RANKS)
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoLR(optimizer, model, calibration_steps=0, probe_every_steps=1, process_group=group)
    try:
        for _ in range(4 if rank == 0 else 0):
            optimizer.zero_grad()
            scheduler.loss(lambda: model(torch.ones(2, 5)).square().mean()).backward()
            optimizer.step()
            scheduler.step()
    except RuntimeError as error:
        said = str(error)
    else:
        said = ""
    dist.barrier()
    return said


def worker(rank, directory):
    torch.set_num_threads(1)
    host_memory.Gpu = LateGpu  # the process is this test's own
    said = alone(rank, directory)
    cases = [*CASES, *((wrap, "uninterrupted", STEPS) for wrap in ("ddp", "fsdp2"))]
    rows = {case: interrupted(*case, rank, directory) for case in cases}
    torch.save((rows, [refused(kind, rank) for kind in (False, True)], said), f"{directory}/result{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return of_each_rank(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("wrap", "way", "at"), CASES)
def test_a_state_goes_on_right_or_leaves_one_probe_out_on_all_ranks(results, wrap, way, at):
    rows, others = results[0][0], results[1][0]
    steps, rates, weights, told = rows[wrap, way, at]
    assert (steps, rates) == others[wrap, way, at][:2]
    assert all(map(torch.equal, weights, others[wrap, way, at][2]))
    all_steps, all_rates, all_weights, _ = rows[wrap.removesuffix(", host"), "uninterrupted", STEPS]
    if way == "by each rank":
        assert (steps, rates) == (all_steps, all_rates)
        assert all(map(torch.equal, weights, all_weights))
    if wrap == "ddp":
        assert steps == all_steps
        assert rates == pytest.approx(all_rates, rel=1e-9)  # a mean of means, rounded elsewhere
        assert not told
        return
    left_out = [step for step in all_steps if step not in steps]
    assert len(set(told) | set(others[wrap, way, at][3])) == (way != "by each rank")
    assert left_out == ([] if way == "by each rank" or at == EARLY else [30])


@pytest.mark.parametrize("kind", [0, 1], ids=["flat", "original"])
def test_fsdp_version_1_is_refused(results, kind):
    said = results[0][1][kind]
    assert len(said) == 2
    assert all("FSDP version 1" in each and "fully_shard" in each for each in said)


def test_a_rank_that_comes_alone_is_told(results):
    assert results[1][2] == ""
    assert results[0][2].startswith("rank 0 of 2 has losses to average, and not all of the other ranks came")
