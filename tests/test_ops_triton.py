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

from autolr_fast import ops
from autolr_fast.scoring import NORMALIZATIONS

triton = pytest.importorskip("triton")
backend = importlib.import_module("autolr_fast.ops.triton")
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
    ops.stack_candidates(prev, now, factors, out, backend="triton")
    ops.stack_candidates(prev, now, factors, expected, backend="torch")
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
    ops.stack_gradient_candidates(now, grad, lr, factors, out, backend="triton")
    ops.stack_gradient_candidates(now, grad, lr, factors, expected, backend="torch")
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
    ops.stack_candidates([prev], [now], [0.0, 1.0], [out], backend="triton")
    assert_same_bits(out, torch.stack([prev, now]))
    assert torch.equal(out[0].signbit(), prev.signbit())


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
        ops.stack_candidates([prev], [now], factors, [rows], backend=name)
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
    addresses = torch.tensor([tensor.data_ptr() - 4 * far for tensor in (prev, now, out)], **integers)
    table = torch.tensor([0.0, 1.0], device=DEVICE)
    untouched = out[200:].clone()
    backend._candidates_kernel[1,](
        owners, sizes, addresses, 1, table, 1, dtype=tl.float32, block=256, num_warps=1, enable_fp_fusion=False
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


SETTINGS = {  # lr, momentum, weight_decay, dampening, nesterov
    1: [(0.1, 0.9, 0.0, 0.0, True)],
    3: [(0.1, 0.9, 0.01, 0.0, True), (0.3, 0.0, 0.1, 0.0, False), (1.0, 0.5, 0.0, 0.3, False)],
    64: [(0.01 * k, 0.9 * (k % 3), 0.001 * (k % 5), 0.0, k % 2 == 0 and k % 3 != 0) for k in range(64)],
}
NAMES = "lr", "momentum", "weight_decay", "dampening", "nesterov"


@runs
@by_dtype
@pytest.mark.parametrize("models", SETTINGS)
def test_stacked_sgd_step(dtype, tolerance, models):
    settings = dict(zip(NAMES, zip(*SETTINGS[models], strict=True), strict=True))
    params = tensors(dtype, models, many=models == 64)
    buffers = [torch.full_like(param, 5.0) for param in params]
    state = {name: ([p.clone() for p in params], [b.clone() for b in buffers]) for name in ("triton", "torch")}
    twins = [[param[k].double().clone() for param in params] for k in range(models)]
    optimizers = [
        torch.optim.SGD(twin, **dict(zip(NAMES, row, strict=True)))
        for twin, row in zip(twins, SETTINGS[models], strict=True)
    ]
    for step in range(2):
        grads = [torch.randn_like(param) for param in params]
        for name, (values, momenta) in state.items():
            ops.stacked_sgd_step(values, grads, momenta, **settings, first_step=step == 0, backend=name)
        for k, optimizer in enumerate(optimizers):
            for twin, grad in zip(twins[k], grads, strict=True):
                twin.grad = grad[k].double()
            optimizer.step()
    assert_same_bits(state["triton"][0], state["torch"][0])
    assert_same_bits(state["triton"][1], state["torch"][1])
    for k in range(models):
        for values, momenta, twin in zip(*state["triton"], twins[k], strict=True):
            assert_near(values[k], double(twin), 20.0, tolerance)
            assert settings["momentum"][k] or (momenta[k] == 5).all()


LOSSES = {
    "source": [0.9, 1.0, 1.2],
    "one": [3.0],
    "two": [-1.0, 2.0],
    "equal": [1.5] * 5,
    "many": np.cos(np.arange(64.0)).tolist(),
    "nan": [math.nan, 1.0, 2.0],
    "infinite": [2.0, -math.inf, 1.0, math.inf],
    "one finite": [math.nan, math.inf, 3.0],
    "none finite": [math.nan, math.inf, -math.inf],
    "all infinite": [math.inf] * 3,
    "large": [5000.0, 5001.0, 5003.0],
    "overflow": [1e308, -1e308, 0.0],
}


def scored(name, losses, normalize, **limits):
    factors = [2.0 ** (len(losses) // 2 - k) for k in range(len(losses))]
    losses = torch.tensor(losses, dtype=torch.float64, device=DEVICE)
    level = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    weights, factor = ops.score(losses, factors, level, normalize=normalize, backend=name, **limits)
    return weights.tolist(), factor.item(), level.item()


@runs
@numpy_may_warn
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_score(losses, normalize):
    for limits in ({}, {"exponent": 0.3}, {"exponent": 0.0}, {"lowest": 0.11}, {"highest": 0.09}):
        weights, factor, level = scored("triton", losses, normalize, **limits)
        expected_weights, expected_factor, expected_level = scored("torch", losses, normalize, **limits)
        assert weights == pytest.approx(expected_weights, rel=1e-12, abs=0)
        assert factor == pytest.approx(expected_factor, rel=1e-12, abs=0)
        assert level == pytest.approx(expected_level, rel=1e-12, abs=0)


@runs
def test_score_by_hand():
    weights, factor, level = scored("triton", [1.0, 3.0, 2.0], "minmax", exponent=0.1, lowest=0.01, highest=0.3)
    raw = np.exp(-np.array([0.0, 1.0, 0.5]))
    share = raw / raw.sum()
    assert weights == pytest.approx(share.tolist(), rel=1e-14)
    assert factor == pytest.approx(2.0 ** (share[0] - share[2]), rel=1e-14)
    assert level == pytest.approx(0.1 * factor**0.1, rel=1e-14)  # as float32, 0.1 would be 1e-8 off
    # A power of 1 is the factor itself, and the limits are met exactly.
    assert scored("triton", [1.0, 3.0, 2.0], "minmax")[2] == 0.1 * factor
    assert scored("triton", [1.0, 3.0, 2.0], "minmax", highest=0.1000000001)[2] == 0.1000000001


def arguments(dtype, device=None):
    """The arguments of each operator, on a small case."""

    def stacked():
        return tensors(dtype, 2, device=device, many=True)

    def wide(*shape):
        return torch.rand(shape, dtype=torch.float64, device=device or DEVICE)

    prev, now = (tensors(dtype, device=device, many=True) for _ in range(2))
    settings = ([0.1, 0.2], [0.9, 0.0], [0.0, 0.1], [0.0, 0.0], [True, False], False)
    return {
        "stack_candidates": (prev, now, [2.0, 0.25], stacked()),
        "stack_gradient_candidates": (prev, now, wide(len(now)), [2.0, 0.25], stacked()),
        "stacked_sgd_step": (stacked(), stacked(), stacked(), *settings),
        "score": (wide(3), [2.0, 1.0, 0.5], "minmax", 1.0, 0.0, math.inf, wide(), wide(3), wide()),
    }


@runs
@pytest.mark.parametrize("operator", ops.SCHEMAS)
def test_opcheck(operator):
    torch.library.opcheck(getattr(torch.ops.autolr_fast, operator).triton, arguments(torch.float32)[operator])


@pytest.mark.skipif(not INTERPRETED, reason="a CPU tensor needs the interpreter")
def test_interpreted_triton_serves_the_cpu():
    assert ops.choose("cpu", "triton") == "triton"


KERNELS = {
    "stack_candidates": "_candidates_kernel",
    "stack_gradient_candidates": "_gradient_candidates_kernel",
    "stacked_sgd_step": "_sgd_kernel",
    "score": "_score_kernel",
}
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
        if param.is_constexpr:
            return "constexpr"
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return param.annotation_type or {int: "i32", float: "fp32"}[type(value)]


def compile_offline(monkeypatch, tmp_path, operator, dtype, capability, **options):
    """Return what the one launch of an operator's call compiles to for a GPU, with none needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    offline = Offline(getattr(backend, KERNELS[operator]), target, **options)
    monkeypatch.setattr(backend, KERNELS[operator], offline)
    getattr(backend, f"_{operator}")(*arguments(dtype, device="cpu")[operator])
    (compiled,) = offline.launches
    return compiled.asm


def fused(ptx):
    return re.findall(r"\bfma\.\S+", ptx)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
@pytest.mark.parametrize("operator", [name for name in KERNELS if name != "score"])
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


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_score_compiles_for(monkeypatch, tmp_path, normalize, capability):
    def arguments_of(dtype, device=None, made=arguments):
        losses, factors, _, *rest = made(dtype, device)["score"]
        return {"score": (losses, factors, normalize, *rest)}

    monkeypatch.setitem(globals(), "arguments", arguments_of)
    assembly = compile_offline(monkeypatch, tmp_path, "score", torch.float64, capability)
    assert assembly["cubin"].startswith(b"\x7fELF")
    assert len(re.findall(r"\.param \.f64", assembly["ptx"])) == 3  # exponent, lowest, highest


# The linear layer at N candidates

LINEAR_SIZES = [(1, 1, 1, 1), (3, 65, 33, 70), (7, 64, 64, 64), (2, 100, 8, 130)]


def linear_arguments(dtype, sizes, transposed, has_bias, device):
    candidates, rows, width, outputs = sizes
    x = torch.randn(candidates, rows, width, dtype=torch.float64)
    now, direction = (torch.randn(width, outputs, dtype=torch.float64).t() for _ in range(2))
    bias = torch.randn(candidates, outputs, dtype=torch.float64) if has_bias else None
    c = torch.linspace(-1, 3, candidates, dtype=torch.float64)
    if not transposed:
        now, direction = now.contiguous(), direction.contiguous()
    tensors = [None if t is None else t.to(device, dtype) for t in (x, now, direction, c, bias)]
    if transposed:
        assert tensors[1].stride(0) == 1
    return tensors


@runs
@numpy_may_warn
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("sizes", LINEAR_SIZES)
def test_candidate_linear(dtype, tolerance, sizes, transposed, has_bias):
    linear = importlib.import_module("autolr_fast.ops.triton_linear")
    x, now, direction, c, bias = linear_arguments(dtype, sizes, transposed, has_bias, DEVICE)
    out = linear.candidate_linear(x, now, direction, c, bias)
    weights = now.double() + c.double()[:, None, None] * direction.double()
    expected = x.double() @ weights.transpose(1, 2)
    if bias is not None:
        expected += bias.double()[:, None]
    assert out.dtype == dtype
    scale = (x.double().abs() @ weights.abs().transpose(1, 2)).max().item() + 1
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * scale)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_candidate_linear_compiles_for(monkeypatch, tmp_path, dtype, capability):
    linear = importlib.import_module("autolr_fast.ops.triton_linear")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    offline = Offline(linear._linear_kernel, target)
    monkeypatch.setattr(linear, "_linear_kernel", offline)
    linear.candidate_linear(*linear_arguments(dtype, (3, 128, 64, 128), False, True, "cpu"))
    (compiled,) = offline.launches
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    if dtype != torch.float32:  # tensor cores; IEEE float32 has none
        assert re.search(r"\b(wgmma|mma)\.", compiled.asm["ptx"])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_all_that_runs_also_runs_interpreted():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", Path(__file__).name]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100
