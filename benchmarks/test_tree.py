"""What a search over learning rates costs: all branches at once, against one training after another.

``make bench`` runs it and writes ``results/tree.md``. A GPU is used where there is one; a call is then timed until
the device has finished.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

from autolr_fast import ALRTree

from .device import DEVICE, about, wait
from .memory import measure_apart
from .problems import SEED, Problem, make_problem
from .tree_memory import FACTORS, SEQUENTIAL

MODELS = ("mlp", "convnet", "transformer")
ROUNDS = dict(zip(MODELS, (10, 10, 5) if DEVICE == "cuda" else (30, 15, 2), strict=True))
SIZES = ((1, 3), (2, 3), (3, 5), (4, 7))
METHODS = ("auto", "batched", "sequential")
_LR = 1e-6  # every branch stays finite, however often it is stepped

pytestmark = pytest.mark.filterwarnings("ignore")  # auto says what it cannot use


@pytest.fixture(scope="module", params=MODELS)
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    """A model and a batch."""
    made = make_problem(request.param, DEVICE)
    for group in made.optimizer.param_groups:
        group["lr"] = _LR
    made.train()
    yield made
    gc.collect()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_step(benchmark: Any, problem: Problem, method: str, size: tuple[int, int]) -> None:
    """One batch for M x N branches, SGD with momentum; before each round as many training steps of one model.

    One training after another keeps its model in the caches from step to step, as those steps do.
    """
    beams, factors = size
    # As many first beams as there will be.
    lrs = [_LR * (1 + beam) for beam in range(beams)]
    tree = ALRTree(
        problem.model,
        problem.loss_fn,
        lrs,
        beams=beams,
        factors=FACTORS[factors],
        optimizer_options={"momentum": 0.9},
        method=method,
    )
    tree.step(*problem.batch)  # the first checks the model, allocates, and chooses
    floors: list[float] = []

    def one_after_another() -> None:
        wait()
        start = time.perf_counter()
        for _ in range(beams * factors):
            problem.train()
        wait()
        floors.append(time.perf_counter() - start)

    def call() -> None:
        tree.step(*problem.batch)
        wait()

    rounds = ROUNDS[problem.name]
    benchmark.pedantic(call, setup=one_after_another, rounds=rounds, warmup_rounds=1 if rounds > 10 else 0)
    benchmark.extra_info.update(
        memory_of(problem.name, size, method),
        reference_peak=memory_of(problem.name, size, SEQUENTIAL)["peak"],
        what=method,
        ran=tree.method,
        model=problem.name,
        beams=beams,
        n=factors,
        floors_ms=[1e3 * seconds for seconds in floors[-rounds:]],
        parameters=sum(now.numel() for now in problem.now),
        tensors=len(problem.now),
        **about(),
        seed=SEED,
    )


@functools.cache
def memory_of(model: str, size: tuple[int, int], method: str) -> dict[str, Any]:
    """Return the memory that a search takes, measured once."""
    return measure_apart("benchmarks.tree_memory", model, *size, method)
