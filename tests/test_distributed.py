"""Two processes with gloo: each with its own batches, one learning rate."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from autolr_fast import AutoLR, Rule
from autolr_fast._machine.ranks import mean_over_ranks

from .helpers import assert_same, convnet, everything, mlp, of_each_rank, sgd, train_step

RANKS = 2
STEPS = 8

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def start(name, direction, evaluator, wrap):
    torch.manual_seed(5)
    model = convnet(dropout=0.0) if name == "convnet" else mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model = wrap(model)
    scheduler = AutoLR(
        optimizer,
        model,
        probe_every_steps=2,
        calibration_steps=3,
        rule=Rule(direction=direction),
        evaluator=evaluator,
        total_steps=20,
    )
    return model, optimizer, scheduler


def loss_at(model, name, rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    shape = (8, 2, 4, 4) if name == "convnet" else (8, 5)
    x = torch.randn(shape, generator=generator)
    return F.cross_entropy(model(x), torch.randint(3, (8,), generator=generator))


def trained(rank, case):
    name = case[0]
    model, optimizer, scheduler = start(*case, DistributedDataParallel)
    rows = []
    for step in range(STEPS):
        loss_of = partial(loss_at, name=name, rank=rank, step=step)
        optimizer.zero_grad()
        scheduler.loss(partial(loss_of, model)).backward()
        optimizer.step()
        before = everything(model, optimizer)
        scheduler.step()
        probe = scheduler.last_probe
        if probe.rounds == 1:  # calibration moves the parameters
            assert_same(before, everything(model, optimizer))
        rows.append((scheduler.get_last_lr()[0], probe.losses, probe.evaluator))
    return rows, [parameter.detach().clone() for parameter in model.parameters()]


def shared(rank):
    """What a rank would save of its losses, before and after all have shared them."""
    model, _, scheduler = start("mlp", "step", "inplace", DistributedDataParallel)
    for step in range(3):
        scheduler.loss(partial(loss_at, model, "mlp", rank, step))
    own = scheduler.state_dict()["losses"]
    scheduler.share_losses()
    return own, scheduler.state_dict()["losses"]


def sharded(rank, evaluator):
    """Training losses and probes of a model under FSDP2, whose root holds parameters too."""
    torch.manual_seed(5)
    model = mlp()
    fully_shard(model[2])
    fully_shard(model)
    optimizer = sgd(model, lr=0.1, momentum=0.9)
    pinned = {"lr_limits": (0.1, 0.1), "calibration_steps": 0, "probe_every_steps": 1, "rule": Rule()}
    scheduler = AutoLR(optimizer, model, **pinned, evaluator=evaluator) if evaluator else None
    losses, probes = [], []
    for step in range(STEPS):
        loss_of = partial(loss_at, name="mlp", rank=rank, step=step)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if scheduler:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*sharded over ranks")
                scheduler.step(partial(loss_of, model))
            if step:  # the first has none: where a step before began is not known
                probes.append(scheduler.last_probe.losses)
    return losses, probes


def worker(rank, directory, cases):
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    results = [trained(rank, case) for case in cases]
    results.append(shared(rank))
    results.append([sharded(rank, evaluator) for evaluator in (None, "inplace", "auto")])
    results.append(mean_over_ranks(torch.tensor([1.0 + rank, 10.0 * rank]), None))
    torch.save(results, f"{directory}/result{rank}.pt")
    dist.destroy_process_group()


CASES = [
    ("mlp", "step", "inplace"),
    ("mlp", "step", "auto"),
    ("mlp", "gradient", "inplace"),
    ("convnet", "step", "inplace"),
    ("convnet", "step", "auto"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return of_each_rank(worker, tmp_path_factory.mktemp("ranks"), CASES)


def test_mean_by_hand(results):
    for of_rank in results:
        assert of_rank[-1].tolist() == [1.5, 5.0]
    assert mean_over_ranks(torch.tensor([3.0]), None).item() == 3.0


def test_ranks_share_the_mean_of_their_losses(results):
    (own, after), (other_own, other_after) = (of_rank[-3] for of_rank in results)
    assert own[0] != other_own[0]
    assert after == other_after
    assert after == (pytest.approx((own[0] + other_own[0]) / 2), 3)


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_ranks_agree_bitwise(results, case):
    (rows, parameters), (other_rows, other_parameters) = (of_rank[case] for of_rank in results)
    assert [row[0] for row in rows] == [row[0] for row in other_rows]
    assert [row[2] for row in rows] == [row[2] for row in other_rows]
    assert_same([row[1] for row in rows], [row[1] for row in other_rows])
    assert_same(parameters, other_parameters)
    assert len({row[0] for row in rows}) > 5


@pytest.mark.parametrize("case", [0, 1, 2], ids=["-".join(case) for case in CASES[:3]])
def test_ranks_equal_one_process_with_all_batches(results, case):
    """Without BatchNorm the mean of the ranks' losses is the loss of their batches together."""
    model, optimizer, scheduler = start(*CASES[case], lambda model: model)

    def loss(model, step):
        return torch.stack([loss_at(model, CASES[case][0], rank, step) for rank in range(RANKS)]).mean()

    rows, parameters = results[0][case]
    for step, (lr, losses, _) in enumerate(rows):
        optimizer.zero_grad()
        scheduler.loss(partial(loss, model, step)).backward()
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(scheduler.last_probe.losses, losses, rtol=1e-4, atol=1e-5)
        assert scheduler.get_last_lr()[0] == pytest.approx(lr, rel=1e-3)
    for ours, theirs in zip(parameters, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-4)


def test_sharded_model_trains_as_if_it_were_not_probed(results):
    for of_rank in results:
        (without, _), (inplace, _), (auto, _) = of_rank[-2]
        assert inplace == without
        assert auto == without


def test_sharded_candidates_equal_whole_ones(results):
    torch.manual_seed(5)
    model = mlp()
    optimizer = sgd(model, lr=0.1, momentum=0.9)
    scheduler = AutoLR(
        optimizer,
        model,
        lr_limits=(0.1, 0.1),
        calibration_steps=0,
        probe_every_steps=1,
        rule=Rule(),
        evaluator="inplace",
    )
    for step in range(STEPS):

        def loss(model, step=step):
            return torch.stack([loss_at(model, "mlp", rank, step) for rank in range(RANKS)]).mean()

        train_step(model, optimizer, loss)
        scheduler.step(partial(loss, model))
        for _, probes in results[0][-2][1:] if step else []:
            torch.testing.assert_close(probes[step - 1], scheduler.last_probe.losses, rtol=1e-4, atol=1e-5)
