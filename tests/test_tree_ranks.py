"""A search whose branches are shared out to processes: the same as in one; a process that dies is named."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from autolr_fast import ALRTree
from autolr_fast._tree.ranks import Ranks

from .helpers import convnet

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

EPOCHS = 3
# Uneven shares; and fewer branches than ranks, so that one rank has none in some epochs.
CASES = {
    "sequential": {"method": "sequential", "factors": (3.0, 2.0, 1.0, 0.5, 0.3)},
    "momentum": {"method": "sequential", "optimizer_options": {"momentum": 0.9}},
    "adamw": {"method": "sequential", "optimizer": "adamw"},
    "few": {"method": "sequential", "factors": (2.0, 0.5), "beams": 1, "optimizer_options": {"momentum": 0.9}},
    "batched": {"method": "batched", "factors": (3.0, 2.0, 1.0, 0.5, 0.3), "optimizer_options": {"momentum": 0.9}},
}


def make_tree(case):
    torch.manual_seed(1)
    return ALRTree(convnet(), F.cross_entropy, 0.03, **CASES[case])


def make_batches():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(22, 2, 4, 4, generator=generator)
    return list(zip(x.split(8), torch.randint(3, (22,), generator=generator).split(8), strict=True))


def search(case, epochs=EPOCHS, state=None):
    """What a search ends with, and its state after each epoch."""
    tree, states = make_tree(case), []
    torch.manual_seed(3)
    if state is not None:
        tree.load_state_dict(state)
    tree.fit(make_batches(), epochs, callback=lambda epoch: states.append(copy.deepcopy(tree.state_dict())))
    return states


def worker(rank, ranks, directory, job):
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=30))
    torch.set_num_threads(1)
    torch.save(job(rank, directory), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def all_cases(rank, directory):
    return {case: search(case) for case in CASES}


def dies(rank, directory):
    """Rank 1 in the second epoch; the others tell what they saw."""
    tree = make_tree("momentum")
    torch.manual_seed(3)
    tree.fit_epoch(make_batches())
    state = copy.deepcopy(tree.state_dict())
    for batch in make_batches():
        tree.step(*batch)
    if rank == 1:
        os._exit(3)
    try:
        tree.end_epoch()
    except RuntimeError as error:
        return {"error": str(error), "state": state}
    return None


def refuses(rank, directory):
    """Within an epoch a state belongs to its rank."""
    tree = make_tree("momentum")
    tree.step(*make_batches()[0])
    state = tree.state_dict()
    state["epoch"]["rank"] = [rank, 3]
    said = []
    for wrong in (
        lambda: make_tree("momentum").load_state_dict(state),
        lambda: ALRTree(DistributedDataParallel(convnet()), F.cross_entropy, 0.1),
    ):
        try:
            wrong()
        except ValueError as error:
            said.append(str(error))
    return said


def run(directory, ranks, job):
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(rank, ranks, str(directory), job), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode is not None
    paths = [directory / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]


@pytest.fixture(scope="module")
def alone():
    return {case: search(case) for case in CASES}


def assert_same_state(state, expected, exactly):
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    for key in ("learning_rates", "model", "stack"):
        torch.testing.assert_close(state[key], expected[key], **tolerance)
    for epoch, other in zip(state["history"], expected["history"], strict=True):
        assert epoch["survivors"] == other["survivors"]
        torch.testing.assert_close(torch.tensor(epoch["branches"]), torch.tensor(other["branches"]), **tolerance)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_as_in_one_process(tmp_path, alone, ranks):
    for of_rank in run(tmp_path, ranks, all_cases):
        for case, states in of_rank.items():
            for state, expected in zip(states, alone[case], strict=True):
                assert_same_state(state, expected, exactly=case != "batched")
    # and it goes on with fewer
    for case in CASES:
        states = search(case, state=of_rank[case][0])
        assert_same_state(states[-1], alone[case][-1], exactly=case != "batched")


def test_a_rank_that_dies_is_named(tmp_path, alone):
    results = run(tmp_path, 3, dies)
    assert results[1] is None
    for rank in (0, 2):
        assert f"rank 1 did not end the epoch (rank {rank} saw: " in results[rank]["error"]
        assert "Load the state that was saved after an epoch" in results[rank]["error"]
        assert_same_state(results[rank]["state"], alone["momentum"][0], exactly=True)
    tree = make_tree("momentum")
    tree.load_state_dict(results[2]["state"])
    tree.fit(make_batches(), EPOCHS)
    assert_same_state(tree.state_dict(), alone["momentum"][-1], exactly=True)


def test_what_is_refused(tmp_path):
    for rank, said in enumerate(run(tmp_path, 2, refuses)):
        assert f"state_dict is of rank {rank} of 3 within an epoch, and this is rank {rank} of 2" in said[0]
        assert "model=DistributedDataParallel is spread over ranks: pass the plain module" in said[1]


@pytest.mark.parametrize("branches", [1, 2, 7, 15])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares(branches, count):
    ranks = Ranks()
    ranks.count = count
    shares = [list(ranks.share(branches, rank)) for rank in range(count)]
    assert [index for share in shares for index in share] == list(range(branches))
    sizes = list(map(len, shares))
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
