"""The Triton backend, three ways: on a GPU, in Triton's interpreter, and compiled for GPUs that are not there.

Whether a kernel is interpreted is settled when it is decorated, so one process cannot do both: the last test
runs this file once more in a process of its own, with TRITON_INTERPRET=1, and nothing leaks into other tests.
"""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from autolr_fast import _ops as ops
from autolr_fast._ops.schemas import SCHEMAS

triton = pytest.importorskip("triton")
backend = importlib.import_module("autolr_fast._ops.triton")
compiler = importlib.import_module("triton.compiler")
tl = importlib.import_module("triton.language")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: see the last test")
compiles = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")
numpy_may_warn = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it interprets, and remarks on nan

# dtype, error allowed against float64 as a share of the largest term; against the backend torch it is 0
DTYPES = [(torch.float64, 1e-15), (torch.float32, 4e-7), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
by_dtype = pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)

LONG = 600 if INTERPRETED else 5000  # more than two blocks; an interpreted one takes a while
SHAPES = [(1,), (3,), (127,), (1025,), (LONG,), (6, 8), (), (16, 3, 5, 5)]
FACTORS = {
    1: [-2.0],
    2: [0.0, 1.0],
    3: [2.0, 1.0, 0.5],
    7: [8.0, 1.0, 0.0, 0.3, -2.0, 0.499, -0.25],
    64: np.linspace(-4, 8, 64).tolist(),
}
by_factors = pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)


def tensors(dtype, *leading, device=None, many=False):
    """Random tensors of all shapes, one unaligned, one channels-last; or, for many rows, fewer."""
    made = [torch.randn((*leading, *shape), dtype=torch.float64) for shape in SHAPES]
    made = [tensor.to(device or DEVICE, dtype) for tensor in made]
    made[-1] = made[-1].movedim(-3, -1).contiguous().movedim(-1, -3)
    shifted = torch.empty(made[4].numel() + 1, dtype=dtype, device=made[4].device)[1:].view_as(made[4])
    made.append(shifted.copy_(made[4]))
    return made[2:3] + made[5:6] if many else made


def double(tensor):
    return tensor.double().cpu().numpy()


def assert_same_bits(written, expected):
    for a, b in zip(written, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_near(tensor, expected, scale, tolerance):
    assert np.abs(double(tensor) - expected).max() <= tolerance * scale


@runs
@by_dtype
@by_factors
def test_stack_candidates(dtype, tolerance, factors):
    many = len(factors) == 64
    prev, now = tensors(dtype, many=many), tensors(dtype, many=many)
    out, expected = (tensors(dtype, len(factors), many=many) for _ in range(2))
    ops.candidate_writer(prev, now, out, backend="triton")(factors)
    ops.candidate_writer(prev, now, expected, backend="torch")(factors)
    assert_same_bits(out, expected)
    for start, end, rows in zip(prev, now, out, strict=True):
        for factor, row in zip(factors, rows, strict=True):
            a, b = double(start), double(end)
            scale = max(1, abs(factor)) * (np.abs(a).max() + np.abs(b).max())
            assert_near(row, a + factor * (b - a), scale, tolerance)


@runs
@by_dtype
@by_factors
def test_stack_gradient_candidates(dtype, tolerance, factors):
    many = len(factors) == 64
    now, grad = tensors(dtype, many=many), tensors(dtype, many=many)
    lr = torch.rand(len(now), dtype=torch.float64, device=DEVICE)
    out, expected = (tensors(dtype, len(factors), many=many) for _ in range(2))
    ops.gradient_candidate_writer(now, grad, lr, out, backend="triton")(factors)
    ops.gradient_candidate_writer(now, grad, lr, expected, backend="torch")(factors)
    assert_same_bits(out, expected)
    for value, gradient, rate, rows in zip(now, grad, lr.tolist(), out, strict=True):
        for factor, row in zip(factors, rows, strict=True):
            a, step = double(value), factor * rate * double(gradient)
            assert_near(row, a - step, np.abs(a).max() + np.abs(step).max(), tolerance)


@runs
@numpy_may_warn
@by_dtype
def test_end_points_are_exact_also_where_the_step_is_not_finite(dtype, tolerance):
    prev = torch.tensor([1.0, math.inf, -math.inf, math.nan, -0.0], dtype=dtype, device=DEVICE)
    now = torch.tensor([math.inf, 2.0, math.inf, 3.0, math.nan], dtype=dtype, device=DEVICE)
    out = torch.empty(2, 5, dtype=dtype, device=DEVICE)
    ops.candidate_writer([prev], [now], [out], backend="triton")([0.0, 1.0])
    assert_same_bits(out, torch.stack([prev, now]))
    assert torch.equal(out[0].signbit(), prev.signbit())


@runs
@numpy_may_warn
@by_dtype
def test_a_factor_of_0_takes_nothing_of_a_gradient_that_is_not_finite(dtype, tolerance):
    now = torch.tensor([1.0, math.inf, math.nan, -0.0], dtype=dtype, device=DEVICE)
    grad = torch.tensor([math.inf, 2.0, 3.0, math.nan], dtype=dtype, device=DEVICE)
    out, lr = torch.empty(1, 4, dtype=dtype, device=DEVICE), torch.ones(1, dtype=torch.float64, device=DEVICE)
    ops.gradient_candidate_writer([now], [grad], lr, [out], backend="triton")([0.0])
    assert_same_bits(out, now.unsqueeze(0))


@runs
@numpy_may_warn
@by_dtype
def test_overflow_and_nan_go_where_the_backend_torch_has_them(dtype, tolerance):
    large = torch.finfo(dtype).max
    prev = torch.tensor([large, -large, 1.0, math.nan, 0.0], dtype=dtype, device=DEVICE)
    now = torch.tensor([-large, large, math.inf, 1.0, torch.finfo(dtype).tiny], dtype=dtype, device=DEVICE)
    factors = [8.0, 0.25, -2.0]
    out = {name: torch.empty(3, 5, dtype=dtype, device=DEVICE) for name in ("triton", "torch")}
    for name, rows in out.items():
        ops.candidate_writer([prev], [now], [rows], backend=name)(factors)
    assert_same_bits(out["triton"], out["torch"])
    assert not out["triton"].isfinite().all()


@runs
def test_offsets_are_64_bit():
    """The only program finds itself 2**33 elements into a tensor whose other elements do not exist."""
    far = 2**33
    prev, now, out = (torch.randn(256, device=DEVICE) for _ in range(3))
    expected = now + (now - prev)
    integers = {"dtype": torch.int64, "device": DEVICE}
    owners = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sizes = torch.tensor([far + 200, -far // 256], **integers)
    places = torch.tensor([*(tensor.data_ptr() - 4 * far for tensor in (prev, now, out)), 0], **integers)
    table = torch.tensor([0.0, 1.0], device=DEVICE)
    untouched = out[200:].clone()
    backend._rows_kernel[1,](
        *(owners, sizes, places, 1, table, 1),
        has_lr=False,
        dtype=tl.float32,
        block=256,
        num_warps=1,
        enable_fp_fusion=False,
    )
    assert torch.equal(out[:200], expected[:200])
    assert torch.equal(out[200:], untouched)


@runs
def test_tensors_without_elements():
    empty, full = torch.empty(0, device=DEVICE), torch.ones(2, device=DEVICE)
    operator = torch.ops.autolr_fast.stack_candidates.triton
    operator([empty], [empty], [1.0], [torch.empty(1, 0, device=DEVICE)])
    out = torch.zeros(1, 2, device=DEVICE)
    lists = [empty, full, empty], [empty, 2 * full, empty]
    operator(*lists, [2.0], [empty.view(1, 0), out, empty.view(1, 0)])
    assert out.tolist() == [[3.0, 3.0]]


@runs
def test_tables_are_uploaded_once_and_follow_the_addresses():
    prev, now = tensors(torch.float32), tensors(torch.float32)
    out = tensors(torch.float32, 2)
    call = torch.ops.autolr_fast.stack_candidates.triton
    call(prev[:3], now[:3], [2.0, 0.5], out[:3])
    before = backend._table.cache_info().misses, backend._layout.cache_info().misses
    now[0].fill_(7.0)
    call(prev[:3], now[:3], [2.0, 0.5], out[:3])
    assert (backend._table.cache_info().misses, backend._layout.cache_info().misses) == before
    assert torch.equal(out[0][0], 7.0 + (7.0 - prev[0]))
    moved = [tensor.clone() for tensor in now[:3]]
    now[0].fill_(math.nan)
    call(prev[:3], moved, [2.0, 0.5], out[:3])
    assert backend._table.cache_info().misses == before[0] + 1
    assert torch.equal(out[0][0], 7.0 + (7.0 - prev[0]))


@runs
def test_a_writer_prepares_its_tables_once_and_again_where_rows_move():
    prev, now = tensors(torch.float32), tensors(torch.float32)
    out = tensors(torch.float32, 2)
    write = ops.candidate_writer(prev[:3], now[:3], out[:3], backend="triton")
    before = backend._table.cache_info().misses, backend._layout.cache_info().misses
    for factor in (2.0, 0.25):
        write([factor, 1.0])
        base = prev[0] if factor < 0.5 else now[0] - (now[0] - prev[0])
        torch.testing.assert_close(out[0][0], base + factor * (now[0] - prev[0]))
    assert (backend._table.cache_info().misses, backend._layout.cache_info().misses) == before
    storage = out[2].untyped_storage()
    place, size = storage.data_ptr(), storage.nbytes()
    storage.resize_(0)
    others = [torch.zeros_like(now[2]).expand(2, -1).contiguous() for _ in range(4)]  # one of them has the place
    storage.resize_(size)
    assert storage.data_ptr() != place
    write([2.0, 1.0])
    assert torch.equal(out[2][1], now[2])
    assert not any(other.any() for other in others)


@runs
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck_of_a_plan(gradient):
    first, second, *lr, _, out = arguments(torch.float32)[f"stack_{'gradient_' * gradient}candidates"]
    operands = (first, second, lr[0] if gradient else None, out)
    plan, write = (getattr(torch.ops.autolr_fast, name).triton for name in ("plan", "write"))
    torch.library.opcheck(plan, operands, test_utils=("test_schema", "test_autograd_registration"))
    torch.library.opcheck(write, (plan(*operands), [2.0, 0.25], out[0]))
    assert plan(first, second[:1], *operands[2:]) == []
    assert plan(first, [tensor.double() for tensor in second], *operands[2:]) == []


@runs
def test_a_plan_serves_one_stream():
    """Its tables are read in the order in which they are uploaded; a writer makes another."""
    first, second, _, out = arguments(torch.float32)["stack_candidates"]
    plan = torch.ops.autolr_fast.plan.triton(first, second, None, out)
    plan[0][1] += 1  # as if it had been made on another
    with pytest.raises(RuntimeError, match="serves the stream that it was made on"):
        torch.ops.autolr_fast.write.triton(plan, [2.0, 0.25], out[0])


def arguments(dtype, device=None):
    """The arguments of each operator, on a small case."""
    prev, now = (tensors(dtype, device=device, many=True) for _ in range(2))
    out = tensors(dtype, 2, device=device, many=True)
    lr = torch.rand(len(now), dtype=torch.float64, device=device or DEVICE)
    return {
        "stack_candidates": (prev, now, [2.0, 0.25], out),
        "stack_gradient_candidates": (prev, now, lr, [2.0, 0.25], out),
    }


@runs
@pytest.mark.parametrize("operator", SCHEMAS)
def test_opcheck(operator):
    torch.library.opcheck(getattr(torch.ops.autolr_fast, operator).triton, arguments(torch.float32)[operator])


@pytest.mark.skipif(not INTERPRETED, reason="a CPU tensor needs the interpreter")
def test_interpreted_triton_serves_the_cpu():
    assert ops.choose("cpu", "triton") == "triton"


TYPES = {torch.int32: "i32", torch.int64: "i64", torch.float32: "fp32", torch.float64: "fp64"}
TYPES |= {torch.float16: "fp16", torch.bfloat16: "bf16"}


class Offline:
    """Stands in for a kernel: a launch compiles it, for its arguments as they come, and runs nothing."""

    def __init__(self, kernel, target, **options):
        self.kernel, self.target, self.options = kernel, target, options
        self.launches = []

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *args, **kwargs):
        params = self.kernel.params
        values = dict(zip([param.name for param in params], args, strict=False))
        values.update({param.name: kwargs.pop(param.name) for param in params if param.name in kwargs})
        signature = {param.name: self._type(param, values[param.name]) for param in params}
        constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        source = compiler.ASTSource(self.kernel, signature, constexprs=constants)
        options = {**kwargs, **self.options}
        self.launches.append(triton.compile(source, target=self.target, options=options))

    def _type(self, param, value):
        if param.is_constexpr or value is None:
            return "constexpr"
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return param.annotation_type or {int: "i32", float: "fp32"}[type(value)]


def compile_offline(monkeypatch, tmp_path, operator, dtype, capability, **options):
    """Return what the one launch of an operator's call compiles to for a GPU, with none needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    offline = Offline(backend._rows_kernel, target, **options)
    monkeypatch.setattr(backend, "_rows_kernel", offline)
    getattr(backend, f"_{operator}")(*arguments(dtype, device="cpu")[operator])
    (compiled,) = offline.launches
    return compiled.asm


def fused(ptx):
    return re.findall(r"\bfma\.\S+", ptx)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
@pytest.mark.parametrize("operator", SCHEMAS)
def test_compiles_for(monkeypatch, tmp_path, operator, dtype, capability):
    assembly = compile_offline(monkeypatch, tmp_path, operator, dtype, capability)
    assert assembly["cubin"].startswith(b"\x7fELF")
    assert f"sm_{capability}" in assembly["ptx"]
    assert fused(assembly["ptx"]) == []
    assert ".ftz" not in assembly["ptx"]
    # 16 bytes at once where rows allow it, and no exchange between threads.
    vector = "v2.b64" if dtype == torch.float64 else "v4.b32"
    assert f"ld.global.{vector}" in assembly["ptx"]
    assert f"st.global.{vector}" in assembly["ptx"]
    assert "shared" not in assembly["ptx"]


@compiles
def test_without_the_option_it_would_fuse(monkeypatch, tmp_path):
    options = {"enable_fp_fusion": True}
    assembly = compile_offline(monkeypatch, tmp_path, "stack_candidates", torch.float32, 90, **options)
    assert fused(assembly["ptx"])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_all_that_runs_also_runs_interpreted():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", Path(__file__).name]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 50
