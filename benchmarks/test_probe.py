"""What a probe costs: every evaluator, against plain loops, in units of what N plain forwards take.

``make bench`` runs it and writes ``results/probe.md``. A GPU is used where there is one; a call is then timed until
the device has finished.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from autolr_fast import FACTORS_3, FACTORS_5, FACTORS_7
from autolr_fast._evaluators import EVALUATORS, EvaluatorError, Prober
from autolr_fast._isolation import Replay

from .baselines import BASELINES, line_search
from .conftest import Refusals
from .device import DEVICE, about, wait
from .problems import SEED, TEXT, Problem, make_problem

# A probe of AutoLR by itself has one or two.
FACTORS = {len(factors): factors for factors in (FACTORS_3[1:], FACTORS_3, FACTORS_5, FACTORS_7)}
MODELS = ("mlp", "perceptron", "small convnet", "convnet", "resnet18", "transformer")
ROUNDS = dict.fromkeys(MODELS, 15)
if DEVICE == "cpu":
    ROUNDS = dict(zip(MODELS, (100, 100, 100, 50, 3, 3), strict=True))
TOLERANCE = 1e-2 if DEVICE == "cuda" else 1e-3  # of losses: there, convolutions round to TF32

pytestmark = pytest.mark.filterwarnings("ignore")  # auto says what it cannot use


class Row(NamedTuple):
    """One row of the table: N candidates of one model.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        problem: the model just after a step.
        expected: factor -> loss, by deep copies; of all factors.
        n: how many candidates.
    """

    benchmark: Any
    problem: Problem
    expected: dict[float, float]
    n: int

    def time_losses(self, what: str, run: Callable[[], list[float]], **info: Any) -> int:
        """Time a call that returns losses, see that they are right, and return how many they are."""
        losses = self.time(what, run, **info)
        # What is wrong may be had for less. A line search may end before the last.
        factors = FACTORS[self.n][: len(losses)]
        assert losses == pytest.approx([self.expected[factor] for factor in factors], rel=TOLERANCE)
        return len(losses)

    def time(self, what: str, run: Callable[[], Any], **info: Any) -> Any:
        """Time a call, and before each round N plain forwards: the machine's speed drifts within minutes."""
        floors: list[float] = []
        problem = self.problem

        def floor() -> None:
            problem.restore()  # a line search or a training step left them elsewhere
            wait()
            start = time.perf_counter()
            problem.forwards(self.n)
            wait()
            floors.append(time.perf_counter() - start)

        def call() -> Any:
            result = run()
            wait()
            return result

        rounds = ROUNDS[problem.name]
        if self.n == 5:
            rounds = max(2, rounds // 2)  # it lies between the others: fewer will do
        result = self.benchmark.pedantic(call, setup=floor, rounds=rounds, warmup_rounds=1 if rounds > 10 else 0)
        problem.restore()
        self.benchmark.extra_info.update(
            info,
            what=what,
            model=problem.name,
            n=self.n,
            floors_ms=[1e3 * seconds for seconds in floors[-rounds:]],
            parameters=sum(now.numel() for now in problem.now),
            tensors=len(problem.now),
            dtype="float32",
            **about(),
            seed=SEED,
            text="from a file" if os.environ.get(TEXT) else "random characters",
        )
        return result


@pytest.fixture(scope="module", params=MODELS)
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    """One model just after a step."""
    made = make_problem(request.param, DEVICE)
    made.forwards(2)
    yield made
    gc.collect()


@pytest.fixture(scope="module")
def expected(problem: Problem) -> dict[float, float]:
    """Factor -> loss."""
    return dict(zip(FACTORS_7, BASELINES["deep copies"](problem, FACTORS_7), strict=True))


@pytest.fixture(params=list(FACTORS))
def row(request: pytest.FixtureRequest, benchmark: Any, problem: Problem, expected: dict[float, float]) -> Row:
    """One row for each number of candidates."""
    return Row(benchmark, problem, expected, request.param)


@pytest.mark.parametrize("name", list(EVALUATORS))
def test_evaluator(row: Row, refusals: Refusals, name: str) -> None:
    """The losses of N candidates by an evaluator of ours, with all that a scheduler does for them."""
    evaluator, line, model, loss = EVALUATORS[name](), row.problem.line(), row.problem.model, row.problem.loss
    prober = Prober(model, evaluator, None, maximize=False, device=torch.device(DEVICE))

    def run() -> list[float]:
        replay = Replay(model)
        replay.add(lambda: loss(model))
        return prober.look(line, replay, FACTORS[row.n]).losses.tolist()

    try:
        run()  # the first call checks the model, allocates, and chooses: once a training
    except EvaluatorError as error:
        refusals.append({"what": name, "model": row.problem.name, "n": row.n, "reason": error.reason})
        pytest.skip(error.reason)
    row.time_losses(name, run, ours=True, ran=evaluator.name)


@pytest.mark.parametrize("name", list(BASELINES))
def test_baseline(row: Row, name: str) -> None:
    """The same losses by a plain loop."""
    row.time_losses(name, lambda: BASELINES[name](row.problem, FACTORS[row.n]))


def test_line_search(row: Row) -> None:
    """Armijo backtracking over the same factors."""
    trials = row.time_losses("line search", lambda: line_search(row.problem, FACTORS[row.n]))
    row.benchmark.extra_info["trials"] = trials


def test_training_step(benchmark: Any, problem: Problem, expected: dict[float, float]) -> None:
    """Forward, backward and the optimizer's step: what a probe is a share of."""
    fresh = make_problem(problem.name, DEVICE)  # the line search needs the gradients that the other has
    Row(benchmark, fresh, expected, 3).time("training step", fresh.train)
