"""The CUDA backend: its grid simulated on the host, its library compiled and taken apart, its results on a GPU."""

import os
import re
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from autolr_fast import _ops as ops
from autolr_fast._ops.schemas import PLANNED, SCHEMAS, overload

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
INCLUDES = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
TRITON = find_spec("triton")
TRITON_BIN = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" if TRITON and TRITON.origin else CUDA_BIN
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-shared",
    "-cudart=static",
    *INCLUDES,
    f"-L{TORCH}/lib",
    "-Xlinker=--no-as-needed",
    "-ltorch",
    "-ltorch_cpu",
]
KERNELS = 2 * 4 * 2  # lines x dtypes x capacities


def find_tool(name):
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(CUDA_BIN), str(TRITON_BIN)]))


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
needs_nvcc = pytest.mark.skipif(not find_tool("nvcc"), reason="there is no nvcc")
needs_cuobjdump = pytest.mark.skipif(
    not (find_tool("cuobjdump") and find_tool("nvdisasm")), reason="there is no cuobjdump: Triton has one"
)


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@needs_compiler
def test_every_thread_of_a_launch_does_what_it_must(tmp_path):
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source, program = ROOT / "tests" / "csrc" / "simulate_grid.cpp", tmp_path / "simulate_grid"
    includes = [f"-I{ROOT}/csrc", "-isystem", f"{TORCH}/include"]
    run("g++", "-std=c++17", "-O1", "-ffp-contract=off", *sanitizers, *warnings, *includes, source, "-o", program)
    assert run(program) == "every thread did what it must\n"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile for sm_80 and sm_90 (10 s); return the library, the folder of intermediate files, and the log."""
    folder = tmp_path_factory.mktemp("cuda")
    library = folder / "_cuda.so"
    source = ROOT / "csrc" / "operators_cuda.cu"
    keep = ["--keep", f"--keep-dir={folder}", "-Xptxas=-v"]
    return library, folder, run(find_tool("nvcc"), *FLAGS, *keep, source, "-o", library)


@needs_nvcc
def test_both_architectures_are_inside(compiled):
    library, _, _ = compiled
    assert set(fat_binary(library.read_bytes())) >= {("elf", 80), ("elf", 90), ("ptx", 90)}


@needs_nvcc
def test_no_kernel_spills_registers(compiled):
    _, _, log = compiled
    assert len(re.findall("Compiling entry function", log)) == 2 * KERNELS
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)) == {"0"}


@needs_nvcc
@pytest.mark.parametrize("architecture", [80, 90])
def test_ptx_rounds_every_operation_and_moves_vectors(compiled, architecture):
    _, folder, _ = compiled
    (path,) = folder.glob(f"*compute_{architecture}.ptx")
    kernels = split(path.read_text(), r"\.entry (\w+)\(")
    assert len(kernels) == KERNELS
    for name, entry in kernels.items():
        code, _, _ = entry.partition("\n}\n")  # functions that are called may follow
        assert re.search(r"\bmul(\.rn)?\.f(32|64)", code), name
        assert not re.search(r"\b(fma|mad)(\.rn)?\.(f32|f64|f16|bf16)", code), name
        assert re.search(r"\bld\.global\S*\.v[24]\.", code), name
        assert re.search(r"\bst\.global\S*\.v4\.", code), name


@needs_nvcc
@needs_cuobjdump
def test_machine_code_rounds_every_operation_and_moves_vectors(compiled):
    library, _, _ = compiled
    path = os.pathsep.join([os.environ["PATH"], str(CUDA_BIN), str(TRITON_BIN)])
    code = run(find_tool("cuobjdump"), "-sass", library, env={**os.environ, "PATH": path})
    kernels = split(code, r"(?:Function : |\barch = )(\S+)")
    assert sum("_kernel" in name for name in kernels) == KERNELS  # the same names in both architectures
    for name, listing in kernels.items():
        if "write_rows" in name:
            assert not re.search(r"\b(FFMA|DFMA|HFMA2|LDL|STL)\b", listing), name
            assert len(re.findall(r"\bLDG\.E\.128\b", listing)) == 2 * 2, name
            assert len(re.findall(r"\bSTG\.E\.EF\.128\b", listing)) == 2, name


@needs_nvcc
@needs_compiler
def test_library_registers_the_operators(compiled):
    """Load it in a process of its own, with what only a torch with CUDA has replaced if this one has none."""
    library, folder, _ = compiled
    symbols = run("nm", "-D", "-C", library)
    assert "U aoti_torch_get_current_cuda_stream" in symbols
    assert "Py" not in symbols
    stub = folder / "stub.cpp"
    stub.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    run("g++", "-shared", "-fPIC", stub, "-o", folder / "stub.so")
    script = f"""
import ctypes, torch
from autolr_fast._ops.schemas import PLANNED, SCHEMAS, overload
if torch.version.cuda is None:
    ctypes.CDLL({str(folder / "stub.so")!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
for name in (*SCHEMAS, *PLANNED):
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key(f"autolr_fast::{{name}}.cuda", "CUDA"))
x, keys = torch.zeros(3), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    overload("stack_candidates", "cuda").redispatch(keys, [x], [x], [2.0], [torch.zeros(1, 3)])
except RuntimeError as error:
    print(error)
"""
    names = [*SCHEMAS, *PLANNED]
    *registered, refused = run(sys.executable, "-c", script, cwd=ROOT).strip().splitlines()[: len(names) + 1]
    # What plans is composite: a list with tensors of several devices comes to it too.
    assert registered == [f"{name} {name != 'plan'}" for name in names]
    assert "not of a CUDA device" in refused


def split(text, pattern):
    """Return the parts of the text by the name that starts each; parts of one name are joined."""
    parts = {}
    _, *rest = re.split(pattern, text)
    for name, part in zip(rest[::2], rest[1::2], strict=True):
        parts[name] = parts.get(name, "") + part
    return parts


def fat_binary(data):
    """Yield kind and architecture of everything that nvcc put into a library."""
    place = -1
    while (place := data.find(struct.pack("<I", 0xBA55ED50), place + 1)) >= 0:
        header, size = struct.unpack_from("<HQ", data, place + 6)
        entry, end = place + header, place + header + size
        while entry < end <= len(data):
            kind, entry_header, entry_size = struct.unpack_from("<HxxIQ", data, entry)
            if kind not in {1, 2}:
                break
            yield ("ptx", "elf")[kind - 1], struct.unpack_from("<I", data, entry + 28)[0]
            entry += entry_header + entry_size


# What follows needs a GPU and the installed library.

DEVICE, BACKEND = "cuda", "cuda"
SERVED = torch.cuda.is_available() and not dict(ops.explain(DEVICE))[BACKEND]
on_gpu = pytest.mark.skipif(not SERVED, reason="there is no GPU, or the library is not compiled")
SIZES = {
    "empty": [0, 0],
    "odd": [0, 1, 3, 127, 128, 1025],
    "large": [100_003, 1 << 20],
    "model": [784 * 256, 256, 256 * 10, 10],
    "several launches": [n * 7 % 41 for n in range(1000)],
}
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
misaligned = pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "misaligned"])


def tensors(sizes, dtype, skip=0, rows=None):
    """Return random tensors ``[size]`` or ``[rows, size]`` that start ``skip`` elements after where memory does."""
    shapes = [(size,) if rows is None else (rows, size) for size in sizes]
    flat = [torch.randn(skip + torch.Size(shape).numel(), device=DEVICE).to(dtype)[skip:] for shape in shapes]
    return [tensor.view(shape) for tensor, shape in zip(flat, shapes, strict=True)]


def assert_same_bits(operator, inputs, out):
    """Write the same candidates by both backends; compare them bitwise."""
    expected = [rows.clone() for rows in out]
    overload(operator, "torch")(*inputs, expected)
    overload(operator, BACKEND)(*inputs, out)
    torch.testing.assert_close(out, expected, atol=0.0, rtol=0.0)


@on_gpu
@dtypes
@sizes
@misaligned
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_candidates_are_those_of_torch(sizes, dtype, skip, rows):
    factors = [8.0, 1.0, 0.5, 0.0, 0.25, -3.0, 1e3, *(0.1 * n for n in range(57))][:rows]
    prev, now, out = tensors(sizes, dtype, skip), tensors(sizes, dtype, skip), tensors(sizes, dtype, skip, rows)
    assert_same_bits("stack_candidates", [prev, now, factors], out)


@on_gpu
@dtypes
@sizes
@misaligned
def test_gradient_candidates_are_those_of_torch(sizes, dtype, skip):
    lr = torch.rand(len(sizes), dtype=torch.float64, device=DEVICE)
    now, grad, out = tensors(sizes, dtype, skip), tensors(sizes, dtype, skip), tensors(sizes, dtype, skip, 3)
    assert_same_bits("stack_gradient_candidates", [now, grad, lr, [2.0, 0.0, 0.125]], out)


@on_gpu
def test_strides_are_kept():
    shape = (8, 3, 5, 5)
    now, prev = (torch.randn(shape, device=DEVICE).to(memory_format=torch.channels_last) for _ in range(2))
    out = torch.empty(2, 8, 5, 5, 3, device=DEVICE).permute(0, 1, 4, 2, 3)
    ops.candidate_writer([prev], [now], [out], backend=BACKEND)([3.0, 1.0])
    assert torch.equal(out[0], now + 2.0 * (now - prev))
    assert torch.equal(out[1], now)


@on_gpu
@pytest.mark.skipif(
    SERVED and torch.cuda.get_device_properties(0).total_memory < 32 << 30, reason="the GPU's memory is too small"
)
def test_more_than_two_to_the_31_elements():
    count = (1 << 31) + 5
    prev, now = (torch.zeros(count, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    now[-6:] = torch.arange(1, 7, dtype=torch.bfloat16, device=DEVICE)
    out = torch.full((2, count), 7.0, dtype=torch.bfloat16, device=DEVICE)
    ops.candidate_writer([prev], [now], [out], backend=BACKEND)([2.0, 1.0])
    assert out[:, -7:].tolist() == [[0, 2, 4, 6, 8, 10, 12], [0, 1, 2, 3, 4, 5, 6]]
    assert not out[:, : count - 6].any()


@on_gpu
@dtypes
@sizes
@misaligned
@pytest.mark.parametrize("gradient", [False, True])
def test_a_plan_writes_what_torch_does(sizes, dtype, skip, gradient):
    lr = torch.rand(len(sizes), dtype=torch.float64, device=DEVICE) if gradient else None
    first, second, out = (tensors(sizes, dtype, skip, rows) for rows in (None, None, 3))
    plan = overload("plan", BACKEND)(first, second, lr, out)
    for factors in ([2.0, 0.0, 0.125], [1.0, 8.0, -1.0]):
        expected = [rows.clone() for rows in out]
        name, rates = ("stack_gradient_candidates", [lr]) if gradient else ("stack_candidates", [])
        overload(name, "torch")(first, second, *rates, factors, expected)
        overload("write", BACKEND)(plan, factors, out[0])
        torch.testing.assert_close(out, expected, atol=0.0, rtol=0.0)


@on_gpu
@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_one_launch_for_a_model_and_nothing_allocated():
    prev, now, out = (tensors(SIZES["model"], torch.float32, 0, rows) for rows in (None, None, 3))
    write = ops.candidate_writer(prev, now, out, backend=BACKEND)
    write([2.0, 1.0, 0.5])
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        write([2.0, 1.0, 0.5])
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1
    assert "write_rows_kernel" in kernels[0]


@on_gpu
def test_current_stream_is_used():
    prev, now, out = torch.zeros(3, 1000, device=DEVICE).unsqueeze(1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        now.fill_(3.0)
        overload("stack_candidates", BACKEND)(list(prev), list(now), [1.0], [out])
    stream.synchronize()
    assert (out == 3.0).all()


@on_gpu
def test_cuda_graph_replays_on_what_the_tensors_hold_then():
    sizes, factors = SIZES["model"], [2.0, 1.0, 0.5]
    prev, now, out = (tensors(sizes, torch.float32, 0, rows) for rows in (None, None, 3))
    lr = torch.rand(len(sizes), dtype=torch.float64, device=DEVICE)
    gradient_out = [torch.empty_like(rows) for rows in out]

    write = ops.candidate_writer(prev, now, out, backend=BACKEND)

    def step(backend):
        write(factors) if backend == BACKEND else overload("stack_candidates", backend)(prev, now, factors, out)
        overload("stack_gradient_candidates", backend)(now, prev, lr, factors, gradient_out)
        return [rows.clone() for rows in (*out, *gradient_out)]

    def reset():
        generator = torch.Generator(DEVICE).manual_seed(1)
        for tensor in (*prev, *now, lr):
            tensor.uniform_(generator=generator)

    step(BACKEND)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(BACKEND)
    reset()
    graph.replay()
    reset()
    torch.testing.assert_close(replayed, step("torch"), atol=0.0, rtol=0.0)


@on_gpu
def test_opcheck():
    prev, now, out = (tensors([3, 130], torch.float32, 0, rows) for rows in (None, None, 2))
    lr = torch.rand(2, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(overload("stack_candidates", BACKEND), (prev, now, [2.0, 1.0], out))
    torch.library.opcheck(overload("stack_gradient_candidates", BACKEND), (now, prev, lr, [2.0, 1.0], out))
    for rates in (None, lr):
        kinds = ("test_schema", "test_autograd_registration")
        torch.library.opcheck(overload("plan", BACKEND), (now, prev, rates, out), test_utils=kinds)
        plan = overload("plan", BACKEND)(now, prev, rates, out)
        torch.library.opcheck(overload("write", BACKEND), (plan, [2.0, 1.0], out[0]))


@on_gpu
def test_tensors_of_the_host_are_refused():
    now, out = tensors([5], torch.float32), tensors([5], torch.float32, 0, 1)
    with pytest.raises(RuntimeError, match="on the tensors' device"):
        overload("stack_gradient_candidates", BACKEND)(now, now, torch.ones(1, dtype=torch.float64), [1.0], out)
