import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autolr_fast import FACTORS_7, AutoLR, Rule
from autolr_fast import _ops as ops
from autolr_fast._ops.schemas import PLANNERS, SCHEMAS, overload

from .helpers import between, mlp, problem, sgd, train_step

pytestmark = pytest.mark.cpu
BACKENDS = [backend for backend, reason in ops.explain("cpu") if not reason]
PLANNED_HERE = [backend for backend in BACKENDS if backend in PLANNERS]
# dtype, atol, rtol of the exact result in float64
DTYPES = [
    (torch.float64, 1e-13, 1e-13),
    (torch.float32, 1e-5, 1e-5),
    (torch.bfloat16, 0.15, 2e-2),
    (torch.float16, 2e-2, 4e-3),
]
# N factors, with both exact ones and some far outside
FACTORS = (8.0, 1.0, 0.0, 0.5, 0.499, -0.3, -2.0, 1000.0)


@pytest.fixture(autouse=True, scope="module")
def _two_threads():
    """The operators share work out to threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pairs(dtype, shapes=((3,), (), (1,), (127,), (64, 33), (0, 4), (5, 7, 3), (100_003,))):
    prev = [torch.randn(shape).to(dtype) for shape in shapes]
    return prev, [before + 0.1 * torch.randn(before.shape).to(dtype) for before in prev]


def rows_like(tensors, count):
    return [torch.full((count, *tensor.shape), math.nan, dtype=tensor.dtype) for tensor in tensors]


def layouts():
    """Tensors whose elements lie in memory as they do in parameters: permuted, with gaps, expanded."""
    return {
        "channels-last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 9).t(),
        "gaps": torch.randn(6, 9)[:, ::2],
        "expanded": torch.randn(6, 1).expand(6, 9),
    }


@pytest.mark.parametrize(("dtype", "atol", "rtol"), DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates(backend, dtype, atol, rtol):
    prev, now = pairs(dtype)
    out = rows_like(prev, len(FACTORS))
    ops.candidate_writer(prev, now, out, backend=backend)(FACTORS)
    for before, after, rows in zip(prev, now, out, strict=True):
        for factor, row in zip(FACTORS, rows, strict=True):
            assert torch.equal(row, between(before, after, factor))  # bitwise
            exact = before.double() + factor * (after.double() - before.double())
            torch.testing.assert_close(row.double(), exact, atol=atol * max(1, abs(factor)), rtol=rtol)
        assert torch.equal(rows[1], after)
        assert torch.equal(rows[2], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_beyond_the_caches(backend, dtype):
    """160 MB and more: where stores may go past the caches; rows that start on a vector and rows that do not."""
    prev, now = pairs(dtype, ((1_000_003,), (999_999,), (262_144,), (5,)))
    factors = (*FACTORS, 4.0, 3.0, 0.125, *FACTORS)
    out = rows_like(prev, len(factors))
    ops.candidate_writer(prev, now, out, backend=backend)(factors)
    for before, after, rows in zip(prev, now, out, strict=True):
        for factor, row in zip(factors, rows, strict=True):
            assert torch.equal(row, between(before, after, factor))


@pytest.mark.skipif(
    "cpp" not in BACKENDS or platform.machine() != "x86_64" or not shutil.which("objdump"),
    reason="there is no library, or nothing to take it apart",
)
def test_stores_past_the_caches_are_fenced():
    """No run shows a store that another thread saw too late: the machine code must have what rules it out."""
    (library,) = Path(ops.__file__).parent.parent.glob("_cpp.*")
    listing = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "movntdq" in listing
    assert "sfence" in listing


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_are_numpys(backend):
    """float32, operation by operation, by another library."""
    prev, now = pairs(torch.float32, ((4099,),))
    out = rows_like(prev, 3)
    ops.candidate_writer(prev, now, out, backend=backend)((0.3, 2.0, 0.7))
    start, end = prev[0].numpy(), now[0].numpy()
    step = end - start
    expected = [
        start + numpy.float32(0.3) * step,
        end + numpy.float32(1.0) * step,
        end + numpy.float32(0.7 - 1) * step,
    ]
    assert all((row.numpy() == other).all() for row, other in zip(out[0], expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_that_are_not_finite_leave_both_ends_exact(backend):
    prev, now = [torch.tensor([math.inf, 1.0, math.nan, 3e38])], [torch.tensor([1.0, math.nan, 2.0, -3e38])]
    out = rows_like(prev, 2)
    ops.candidate_writer(prev, now, out, backend=backend)((1.0, 0.0))
    torch.testing.assert_close(out[0], torch.stack([now[0], prev[0]]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_candidates(backend, dtype, atol, rtol):
    now, grad = pairs(dtype)
    lr = torch.rand(len(now), dtype=torch.float64)
    out, plain = rows_like(now, len(FACTORS)), rows_like(now, len(FACTORS))
    ops.gradient_candidate_writer(now, grad, lr, out, backend=backend)(FACTORS)
    ops.gradient_candidate_writer(now, grad, lr, plain, backend="torch")(FACTORS)
    for value, gradient, rate, rows, others in zip(now, grad, lr, out, plain, strict=True):
        assert torch.equal(rows, others)
        for factor, row in zip(FACTORS, rows, strict=True):
            exact = value.double() - factor * rate * gradient.double()
            torch.testing.assert_close(row.double(), exact, atol=atol * max(1, abs(factor)), rtol=rtol)


@pytest.mark.parametrize("layout", sorted(layouts()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, layout):
    """Inputs and outputs of one layout, and of two."""
    now = layouts()[layout]
    prev = torch.randn(now.shape)
    expected = torch.stack([between(prev, now, factor) for factor in FACTORS])
    for out in (torch.empty(len(FACTORS), *now.shape), torch.empty(*now.shape, len(FACTORS)).movedim(-1, 0)):
        ops.candidate_writer([prev], [now], [out], backend=backend)(FACTORS)
        assert torch.equal(out, expected)
    if layout != "expanded":
        live = now.clone(memory_format=torch.preserve_format)
        ops.candidate_writer([prev], [now], [live.unsqueeze(0)], backend=backend)([0.3])
        assert torch.equal(live, between(prev, now, 0.3))


@pytest.mark.parametrize("layout", sorted(set(layouts()) - {"expanded"}))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_writer_writes_again_and_again(backend, layout):
    now, lr = layouts()[layout], torch.tensor([0.5], dtype=torch.float64)
    prev = torch.randn(now.shape)
    live = now.clone(memory_format=torch.preserve_format)
    write = ops.candidate_writer([prev], [now], [live.unsqueeze(0)], backend=backend)
    write_gradient = ops.gradient_candidate_writer([now], [prev], lr, [live.unsqueeze(0)], backend=backend)
    for factor in (2.0, 0.3, 1.0):
        write([factor])
        assert torch.equal(live, between(prev, now, factor))
        write_gradient([factor])
        torch.testing.assert_close(live, now - factor * 0.5 * prev)


def test_a_writer_of_nothing_writes_nothing():
    ops.candidate_writer([], [], [])([1.0, 2.0])


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=5),
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=64),
    st.sampled_from([row[0] for row in DTYPES]),
)
def test_any_shapes_and_factors(shapes, factors, dtype):
    prev, now = pairs(dtype, shapes)
    for backend in BACKENDS:
        out = rows_like(prev, len(factors))
        ops.candidate_writer(prev, now, out, backend=backend)(factors)
        for before, after, rows in zip(prev, now, out, strict=True):
            assert torch.equal(rows, torch.stack([between(before, after, factor) for factor in factors]))


def test_dtypes_in_one_model_are_grouped():
    prev, now = zip(
        *(pair for row in DTYPES for pair in zip(*pairs(row[0], ((7,), (3, 5))), strict=True)), strict=True
    )
    out = rows_like(prev, 2)
    ops.candidate_writer(prev, now, out)((2.0, 0.25))
    for before, after, rows in zip(prev, now, out, strict=True):
        assert torch.equal(rows[1], between(before, after, 0.25))


class Seen(TorchDispatchMode):
    """Notes which operators of this package run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "autolr_fast":
            self.names.append(str(func).removeprefix("autolr_fast."))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("evaluator", ["inplace", "stacked"])
def test_which_backend_really_runs(backend, evaluator, monkeypatch):
    model, loss_of = problem("mlp")
    optimizer = sgd(model)
    rule = Rule(factors=FACTORS_7)
    scheduler = AutoLR(optimizer, model, calibration_steps=0, probe_every_steps=1, rule=rule, evaluator=evaluator)
    for _ in range(2):
        train_step(model, optimizer, loss_of)
        monkeypatch.setenv("AUTOLR_FAST_BACKEND", backend)
        with Seen() as seen:
            scheduler.step(lambda: loss_of(model))
        assert set(seen.names) == (
            {f"plan.{backend}", f"write.{backend}"} if backend in PLANNERS else {f"stack_candidates.{backend}"}
        )
    # after the first probe, which checks the model: one launch writes all rows, of the rule and of the heat
    looks = (1, 1) if evaluator == "stacked" else (len(FACTORS_7), 2)
    writes = [name for name in seen.names if not name.startswith("plan")]
    assert len(writes) == sum(looks)
    assert len(seen.names) - len(writes) == (2 if backend in PLANNERS else 0)


@pytest.mark.parametrize("layout", sorted(layouts()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_tensors_without_one_order_are_written_by_torch(backend, layout, monkeypatch):
    """In one call, and one by one; both operators."""
    monkeypatch.setenv("AUTOLR_FAST_BACKEND", backend)
    now, lr = layouts()[layout], torch.ones(2, dtype=torch.float64)
    kept = layout in ("channels-last", "transposed")
    other = torch.randn(3)
    out, rest = torch.empty_like(now).unsqueeze(0), torch.empty(1, 3)
    with Seen() as seen:
        ops.candidate_writer([now, other], [now, other], [out, rest])([2.0])
        ops.gradient_candidate_writer([now, other], [now, other], lr, [out, rest])([2.0])
        ops.write_candidate(now, now.contiguous(), 2.0, out[0])
        ops.write_gradient_candidate(now, now.contiguous(), lr[:1], 2.0, out[0])
    assert torch.equal(out[0], now - 2.0 * now)
    written = [name for name in seen.names if not name.startswith("plan")]
    by_it = [f"write.{backend}"] * 2 if backend in PLANNERS else [f"{name}.{backend}" for name in SCHEMAS]
    by_torch = [f"{name}.torch" for name in SCHEMAS]
    assert sorted(written[:-2]) == sorted(by_it if kept else by_it + by_torch)
    assert written[-2:] == (by_it if kept else by_torch)


@pytest.mark.parametrize("operator", SCHEMAS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, operator):
    ops.choose("cpu", backend)
    prev, now = pairs(torch.float32, ((3,), (4, 5)))
    rates = [torch.rand(2, dtype=torch.float64)] if operator == "stack_gradient_candidates" else []
    results = torch.library.opcheck(
        overload(operator, backend), (prev, now, *rates, [2.0, 0.3], rows_like(prev, 2))
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("lr", [None, torch.tensor([0.1, 0.2], dtype=torch.float64)], ids=["step", "gradient"])
@pytest.mark.parametrize("backend", PLANNED_HERE)
def test_opcheck_of_a_plan(backend, lr):
    """What is left out of plan's compares addresses of copies, or needs those of tensors without memory."""
    ops.choose("cpu", backend)
    first, second = pairs(torch.float32, ((3,), (4, 5)))
    out, kinds = rows_like(first, 2), ("test_schema", "test_autograd_registration")
    results = torch.library.opcheck(overload("plan", backend), (first, second, lr, out), test_utils=kinds)
    results |= torch.library.opcheck(
        overload("write", backend), (overload("plan", backend)(first, second, lr, out), [2.0, 0.3], out[0])
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("dtype", "atol", "rtol"), DTYPES)
@pytest.mark.parametrize("backend", PLANNED_HERE)
def test_a_plan_writes_what_the_operator_does(backend, dtype, atol, rtol):
    """Also of what the tensors hold later, and with other factors."""
    ops.choose("cpu", backend)
    first, second = pairs(dtype)
    lr = torch.rand(len(first), dtype=torch.float64)
    for name, rates in (("stack_candidates", None), ("stack_gradient_candidates", lr)):
        out, expected = rows_like(first, len(FACTORS)), rows_like(first, len(FACTORS))
        plan = overload("plan", backend)(first, second, rates, out)
        for factors in (FACTORS, FACTORS[::-1]):
            second[3].add_(1.0)
            overload("write", backend)(plan, factors, out[0])
            overload(name, backend)(first, second, *([] if rates is None else [rates]), factors, expected)
            assert all(map(torch.equal, out, expected))


@pytest.mark.parametrize("backend", PLANNED_HERE)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda prev, now, out: ([], [], []),
        lambda prev, now, out: (prev, now[:1], out),
        lambda prev, now, out: (prev, [now[0].double(), now[1]], out),
        lambda prev, now, out: (prev, [now[0], now[1].t()], out),
        lambda prev, now, out: (prev, now, [out[0], out[1][:1]]),
        lambda prev, now, out: (prev, now, [out[0], out[1].double()]),
        lambda prev, now, out: (
            [x.to(t) for x, t in zip(prev, (torch.float32, torch.float64), strict=True)],
            now,
            out,
        ),
        lambda prev, now, out: ([x[::2] for x in prev], [x[::2] for x in now], [x[:, ::2] for x in out]),
        lambda prev, now, out: ([prev[0].to("meta"), prev[1]], now, out),
    ],
)
def test_tensors_that_fit_no_single_call_have_no_plan(backend, spoil):
    ops.choose("cpu", backend)
    prev, now = pairs(torch.float32, ((4,), (4, 4)))
    first, second, out = spoil(prev, now, rows_like(prev, 2))
    assert overload("plan", backend)(first, second, None, out) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_writer_follows_rows_that_move(backend):
    """Memory that is given back between candidates and comes again elsewhere, as sharded parameters' does."""
    prev, now = pairs(torch.float32, ((64, 33), (7,)))
    out = rows_like(prev, 1)
    write = ops.candidate_writer(prev, now, out, backend=backend)
    write([2.0])
    storage = out[0].untyped_storage()
    place, size = storage.data_ptr(), storage.nbytes()
    storage.resize_(0)
    others = [torch.zeros(64 * 33) for _ in range(4)]  # one of them has the place
    storage.resize_(size)
    assert storage.data_ptr() != place
    write([0.3])
    for before, after, rows in zip(prev, now, out, strict=True):
        assert torch.equal(rows[0], between(before, after, 0.3))
    assert not any(other.any() for other in others)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the package is not compiled here")
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda plan, factors, out: ([], factors, out), "there is no plan"),
        (lambda plan, factors, out: ([plan[0].double()], factors, out), "there is no plan"),
        (lambda plan, factors, out: ([plan[0][:-1]], factors, out), "no plan, or one of another version"),
        (lambda plan, factors, out: ([plan[0] + 1], factors, out), "no plan, or one of another version"),
        (lambda plan, factors, out: (plan, factors[:1], out), "1 factors, and the plan has 2 rows"),
        (lambda plan, factors, out: (plan, factors, out.double()), "out is not of the plan"),
    ],
)
def test_the_compiled_operator_checks_its_plan(spoil, says):
    ops.choose("cpu", "cpp")
    prev, now = pairs(torch.float32, ((4,), (4, 5)))
    out = rows_like(prev, 2)
    plan = overload("plan", "cpp")(prev, now, None, out)
    with pytest.raises(RuntimeError, match=says):
        overload("write", "cpp")(*spoil(plan, [2.0, 1.0], out[0]))
    assert all(rows.isnan().all() for rows in out)


def to_complex(tensors):
    return [tensor.cfloat() for tensor in tensors]


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the package is not compiled here")
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda prev, now, out: (prev, now, [1.0] * 65, out), "65 rows"),
        (lambda prev, now, out: (prev, now[:1], [2.0], out), "unequal length"),
        (lambda prev, now, out: (prev, [now[0].double(), now[1]], [2.0], out), "an input differs"),
        (lambda prev, now, out: (prev, now, [2.0, 1.0], out), "out differs"),
        (lambda prev, now, out: ([prev[0], prev[1].t()], [now[0], now[1].t()], [2.0], out), "out differs"),
        (lambda prev, now, out: ([x[::2] for x in prev], [x[::2] for x in now], [2.0], out), "not dense"),
        (lambda prev, now, out: (to_complex(prev), to_complex(now), [2.0], to_complex(out)), "dtype ComplexFloat"),
    ],
)
def test_the_compiled_operator_checks_what_it_would_write_to(spoil, says):
    ops.choose("cpu", "cpp")
    prev, now = pairs(torch.float32, ((4,), (4, 5)))
    with pytest.raises(RuntimeError, match=says):
        torch.ops.autolr_fast.stack_candidates.cpp(*spoil(prev, now, rows_like(prev, 1)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t, r: ops.candidate_writer([t], [t], [r])([]), "factors has 0 values: give 1 to 64"),
        (lambda t, r: ops.candidate_writer([t], [t], [r])([1.0] * 65), "factors has 65 values"),
        (lambda t, r: ops.candidate_writer([t], [t], [r])([1.0, 2.0]), "2 values and out 1 rows"),
        (lambda t, r: ops.candidate_writer([t], [], [r]), "argument 2 is shorter"),
        (lambda t, r: ops.candidate_writer([t], [t], []), "argument 3 is shorter"),
        (lambda t, r: ops.candidate_writer([t], [t[:2]], [r]), r"\[3\] on cpu, .*\[2\].*expected two alike"),
        (lambda t, r: ops.candidate_writer([t], [t], [r[:, :2]]), r"\[1, 2\] on cpu: expected .* 1 rows"),
        (lambda t, r: ops.candidate_writer([t], [t], [r[0]]), r"\[3\] on cpu: expected .* 3 rows"),
        (lambda t, r: ops.candidate_writer([t, t], [t, t], [r, r[:0]]), r"tensors 1 are .*\[0, 3\].* 1 rows"),
        (lambda t, r: ops.candidate_writer([t], [t.double()], [r]), "float64"),
        (lambda t, r: ops.gradient_candidate_writer([t], [t], t, [r]), "lr is torch.float32"),
    ],
)
def test_bad_operands(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.ones(3), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("backend", "says"),
    [("fast", "no backend of that name, only cuda, triton, cpp, torch"), ("cuda", "it serves cuda only")],
)
def test_a_backend_asked_for_by_name_never_falls_back(backend, says, monkeypatch):
    tensors, out = pairs(torch.float32, ((3,),)), [torch.zeros(1, 3)]
    with pytest.raises(
        ops.BackendError, match=f"backend='{backend}' cannot serve cpu: .*{says}.*What can here:.*torch"
    ):
        ops.candidate_writer(*tensors, out, backend=backend)
    monkeypatch.setenv("AUTOLR_FAST_BACKEND", backend)
    with pytest.raises(ops.BackendError, match=f"AUTOLR_FAST_BACKEND='{backend}' cannot serve cpu"):
        ops.candidate_writer(*tensors, out)
    assert not out[0].any()


def test_a_library_that_does_not_load_is_one_warning_and_plain_torch(tmp_path):
    """In a copy of the package whose library is no library: import is silent, use warns once and works."""
    script = """
import shutil, sys, warnings, pathlib, torch
import autolr_fast
source = pathlib.Path(autolr_fast.__file__).parent
copy = pathlib.Path(sys.argv[1]) / "autolr_fast"
shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
(copy / "_cpp.abi3.so").write_bytes(b"nonsense")
print(copy.parent)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    use = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import torch
    from autolr_fast import _ops as ops
from autolr_fast._ops.schemas import PLANNERS, SCHEMAS, overload
out = [torch.zeros(1, 3)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ops.candidate_writer([torch.zeros(3)], [torch.ones(3)], out)([2.0])
assert out[0].tolist() == [[2.0, 2.0, 2.0]]
assert len(caught) == 1 and "install it again" in str(caught[0].message), caught
try:
    ops.choose("cpu", "cpp")
except ops.BackendError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", use], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "backend='cpp' cannot serve cpu" in done.stdout
    assert "--no-build-isolation" in done.stdout


def test_parameters_of_a_model_share_memory_with_their_rows():
    """What the in-place evaluator writes to is the parameters themselves, whatever their layout."""
    model = mlp()
    with torch.no_grad():
        model[0].weight = nn.Parameter(model[0].weight.t().contiguous().t())
    prev = [parameter.detach() + 1 for parameter in model.parameters()]
    rows = [parameter.detach().unsqueeze(0) for parameter in model.parameters()]
    now = [row[0].clone() for row in rows]
    ops.candidate_writer(prev, now, rows)([FACTORS_7[0]])
    for parameter, before, after in zip(model.parameters(), prev, now, strict=True):
        assert torch.equal(parameter.detach(), between(before, after, 8.0))
    ops.candidate_writer(now, now, rows)([1.0])
    assert all(torch.equal(p.detach(), value) for p, value in zip(model.parameters(), now, strict=True))
