"""How fast all candidates are written: every backend here, against what one would write otherwise.

``make bench`` runs it and writes ``results/ops.md``. A GPU is used where there is one; a call is then timed until
the device has finished.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from autolr_fast import FACTORS_7
from autolr_fast import _ops as ops
from autolr_fast._ops.buffer import StackedBuffer

from .device import DEVICE, about, wait
from .paper.models import ResNet18

BACKENDS = [choice.backend for choice in ops.explain(DEVICE) if not choice.reason]
FACTORS = FACTORS_7


def mlp() -> list[tuple[int, ...]]:
    """Return the shapes of 200 k parameters in 6 tensors."""
    return [(256, 512), (256,), (256, 256), (256,), (16, 256), (16,)]


def resnet18() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-18 for CIFAR-10: 11.2 M parameters in 62 tensors."""
    return [tuple(parameter.shape) for parameter in ResNet18(10).parameters()]


def gpt2() -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2 small: 124 M parameters in 148 tensors."""
    width = 768
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(12 * block), (width,), (width,)]


# name -> (shapes, rounds)
MODELS: dict[str, tuple[Callable[[], list[tuple[int, ...]]], int]] = {
    "mlp": (mlp, 300),
    "resnet18": (resnet18, 30),
    "gpt2": (gpt2, 7),
}


class Work(NamedTuple):
    """P parameters before and after a step, and where N candidates of each are written, ``[N, *shape]``."""

    name: str
    prev: list[Tensor]
    now: list[Tensor]
    rows: list[Tensor]
    rounds: int

    @property
    def bytes(self) -> int:
        """What must move: every input is read once, every output written once."""
        return (len(FACTORS) + 2) * sum(now.numel() * now.element_size() for now in self.now)


@pytest.fixture(scope="module", params=list(MODELS))
def work(request: pytest.FixtureRequest) -> Iterator[Work]:
    """One model's parameters around a step."""
    shapes, rounds = MODELS[request.param]
    torch.manual_seed(0)
    prev = [torch.randn(shape, device=DEVICE) for shape in shapes()]
    now = [before + 0.01 * torch.randn_like(before) for before in prev]
    yield Work(request.param, prev, now, StackedBuffer(now, len(FACTORS)).stacked, rounds)
    gc.collect()


def copies(work: Work) -> Any:
    """The source: N deep copies, each then updated in place."""
    candidates = [copy.deepcopy(work.now) for _ in FACTORS]
    for candidate, factor in zip(candidates, FACTORS, strict=True):
        for theta, before in zip(candidate, work.prev, strict=True):
            theta.sub_(before).mul_(factor).add_(before)
    return candidates


def loop_of_add(work: Work) -> Any:
    """``prev + f * step`` into new tensors, one at a time."""
    steps = [now - prev for prev, now in zip(work.prev, work.now, strict=True)]
    return [[torch.add(prev, s, alpha=f) for prev, s in zip(work.prev, steps, strict=True)] for f in FACTORS]


def foreach_lerp(work: Work) -> Any:
    """Torch's multi-tensor interpolation, once a factor."""
    return [torch._foreach_lerp(work.prev, work.now, factor) for factor in FACTORS]


def foreach_add(work: Work) -> Any:
    """Torch's multi-tensor addition, once a factor."""
    steps = torch._foreach_sub(work.now, work.prev)
    return [torch._foreach_add(work.prev, steps, alpha=factor) for factor in FACTORS]


def lerp_out(work: Work) -> Any:
    """torch.lerp into the same preallocated rows."""
    for prev, now, rows in zip(work.prev, work.now, work.rows, strict=True):
        for factor, row in zip(FACTORS, rows.unbind(0), strict=True):
            torch.lerp(prev, now, factor, out=row)


@torch.compile(dynamic=True)
def _formula(prev: Tensor, now: Tensor, factors: Tensor, rows: Tensor) -> None:
    """prev, now [P], factors [N, 1], rows [N, P]."""
    rows.copy_(torch.lerp(prev, now, factors))


def compiled(work: Work) -> Any:
    """torch.compile of the plain formula, one call a tensor."""
    factors = torch.tensor(FACTORS, device=DEVICE).unsqueeze(1)
    for prev, now, rows in zip(work.prev, work.now, work.rows, strict=True):
        _formula(prev.flatten(), now.flatten(), factors, rows.flatten(1))


ALTERNATIVES = {
    "deep copies + update": copies,
    "loop of add": loop_of_add,
    "foreach lerp": foreach_lerp,
    "foreach add": foreach_add,
    "lerp into the rows": lerp_out,
    "compiled formula": compiled,
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ours(benchmark: Any, work: Work, backend: str) -> None:
    """What a probe that writes all candidates at once does: it makes a writer, and calls it."""

    def run() -> None:
        ops.candidate_writer(work.prev, work.now, work.rows, backend=backend)(FACTORS)

    measure(benchmark, work, f"ours: {backend}", run)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ours_again(benchmark: Any, work: Work, backend: str) -> None:
    """Each further call of a writer."""
    write = ops.candidate_writer(work.prev, work.now, work.rows, backend=backend)
    measure(benchmark, work, f"ours: {backend}, again", lambda: write(FACTORS))


@pytest.mark.parametrize("alternative", list(ALTERNATIVES))
@pytest.mark.filterwarnings("ignore")
def test_alternative(benchmark: Any, work: Work, alternative: str) -> None:
    """What one would write without it."""
    measure(benchmark, work, alternative, lambda: ALTERNATIVES[alternative](work))


def measure(benchmark: Any, work: Work, what: str, run: Callable[[], object]) -> None:
    """Time a call, and before each round a plain copy that moves as many bytes: what the memory gives just then."""
    source = torch.ones(work.bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied: list[float] = []

    def copy_as_much() -> None:
        start = time.perf_counter()
        target.copy_(source)
        wait()
        copied.append(time.perf_counter() - start)

    def call() -> None:
        run()
        wait()

    benchmark.pedantic(call, setup=copy_as_much, rounds=work.rounds, warmup_rounds=2)
    benchmark.extra_info.update(
        what=what,
        model=work.name,
        bytes=work.bytes,
        copy_ms=1e3 * statistics.median(copied),
        parameters=sum(now.numel() for now in work.now),
        tensors=len(work.now),
        candidates=len(FACTORS),
        dtype="float32",
        **about(),
    )
