"""The Trainer on two processes with gloo: each with its own batches, one learning rate."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer

from .helpers import of_each_rank
from .test_transformers import SEARCHING, arguments, examples, gpt2, levels, logged, trained

RANKS = 2
BATCH = 8

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SAVED = {"save_strategy": "steps", "save_steps": 8}  # between two probes
CASES = {
    "plain": {"max_steps": 20, **SAVED},
    "accumulation": {"max_steps": 12, "gradient_accumulation_steps": 2},
}


def run(folder, case, ranks, **how):
    args = arguments(folder, per_device_train_batch_size=BATCH // ranks, **CASES[case])
    trainer = trained(Trainer(gpt2(dropout=0.0), args, train_dataset=examples(48)), SEARCHING, **how)
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "level": levels(trainer),
        "loss": [row["loss"] for row in logged(trainer)[:-1]],
        "probes": [(probe.step, probe.losses) for probe in trainer.lr_scheduler.history],
        "gain": repr(trainer.lr_scheduler.state_dict()["level"]),  # which is of the losses of all ranks
        "tokens": trainer.state.num_input_tokens_seen,
        "weights": [parameter.detach().clone() for parameter in trainer.model.parameters()],
    }


def worker(rank, directory):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", DeprecationWarning)
    of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost"}
    os.environ.update({name: str(value) for name, value in of_torchrun.items()})
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns where torchrun would set it
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    found = {case: run(f"{directory}/{case}", case, RANKS) for case in CASES}
    checkpoint = f"{directory}/plain/checkpoint-{SAVED['save_steps']}"
    found["resumed"] = run(f"{directory}/again", "plain", RANKS, resume_from_checkpoint=checkpoint)
    torch.save(found, f"{directory}/result{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return of_each_rank(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_bitwise(case, results):
    first, second = (of_rank[case] for of_rank in results)
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["level"] == second["level"]
    assert len({*first["level"]}) > 1
    for name in ("probes", "weights"):
        assert len(first[name]) == len(second[name])
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(one, other)
    for (step, one), (other_step, other) in zip(first["probes"], second["probes"], strict=True):
        assert step == other_step
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_with_both_batches(case, results, tmp_path):
    alone, ranks = run(tmp_path, case, ranks=1), results[0][case]
    assert ranks["tokens"] == alone["tokens"]
    assert ranks["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert ranks["level"] == pytest.approx(alone["level"], rel=1e-3)
    for (step, one), (other_step, other) in zip(ranks["probes"], alone["probes"], strict=True):
        assert step == other_step
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_both_ranks_go_on_bit_for_bit_from_what_one_has_saved(results):
    for of_rank in results:
        whole, resumed = of_rank["plain"], of_rank["resumed"]
        assert resumed["level"] == whole["level"]
        assert resumed["gain"] == whole["gain"]
        assert resumed["loss"] == whole["loss"]
        assert [step for step, _ in resumed["probes"]] == [1, 2, 4, 6, 9]
        for one, other in zip(resumed["weights"], whole["weights"], strict=True):
            assert torch.equal(one, other)
