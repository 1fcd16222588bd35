"""What the host does at each write: ``python -m benchmarks.host_time`` writes ``results/host_time.md``.

Tensors have one element and launches do nothing, so that the host's part alone is timed. That of the backend cuda
is compiled from ``host_time.cpp``, for CPU tensors.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from autolr_fast import FACTORS_7
from autolr_fast import _ops as ops
from autolr_fast._ops.schemas import LIBRARY, overload
from autolr_fast._ops.writers import Planned

from .device import about
from .report import write_now

__all__ = ["main", "measure"]

FACTORS = list(FACTORS_7)
TENSORS = {"mlp": 6, "resnet18": 62, "gpt2": 148}
"""Model -> its tensors."""
_ROUNDS, _CALLS = 1000, 3


def main() -> None:
    """Measure all rows, and write them."""
    torch.set_num_threads(1)
    backends = [prepare() for prepare in (_prepare_cuda, _prepare_triton, _prepare_cpp)]
    rows = [measure(model, backend) for model in TENSORS for backend in backends]
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items() if name not in about()))
    write_now("host_time", rows)


def measure(model: str, backend: str) -> dict[str, Any]:
    """Return the microseconds of the operator, of a plan, of a write by it, and of the addresses compared in it."""
    count = TENSORS[model]
    prev, now = ([torch.randn(1) for _ in range(count)] for _ in range(2))
    out = [torch.empty(len(FACTORS), 1) for _ in range(count)]
    operator, planned = overload("stack_candidates", backend), Planned(backend, prev, now, None, out)
    find = [rows.data_ptr for rows in out]
    best = _best(
        {
            "operator_us": lambda: operator(prev, now, FACTORS, out),
            "plan_us": lambda: Planned(backend, prev, now, None, out),
            "write_us": lambda: planned(FACTORS),
            "compare_us": lambda: [place() for place in find],
        }
    )
    return {"model": model, "backend": backend, "tensors": count, "candidates": len(FACTORS), **best, **about()}


def _best(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest time of each, in turns: others use the machine too."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(_CALLS):
                call()
            best[name] = min(best[name], 1e6 * (time.perf_counter() - start) / _CALLS)
    return best


def _prepare_cpp() -> str:
    return ops.choose("cpu", "cpp")


def _prepare_cuda() -> str:
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "host_time.so"
        includes = [f"-I{path}" for path in (root / "csrc", *cpp_extension.include_paths())]
        links = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-ltorch"]
        flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared"]
        flags.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
        source = root / "benchmarks" / "host_time.cpp"
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *flags, *includes, source, "-o", library, *links], check=True)
        torch.ops.load_library(str(library))
    return "cuda"


def _prepare_triton() -> str:
    triton = importlib.import_module("autolr_fast._ops.triton")
    triton._rows_kernel = _NoKernel()
    LIBRARY.impl("stack_candidates.triton", triton._stack_candidates, "CPU")
    LIBRARY.impl("write.triton", triton._write, "CPU")
    return "triton"


class _NoKernel:
    """Launches nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


if __name__ == "__main__":
    main()
