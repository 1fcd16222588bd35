"""Compiles the operators where it can; everything else is declared in pyproject.toml.

torch must be importable, so that pip needs --no-build-isolation; without it the package is pure Python and works.
pip then takes setuptools-scm from the environment too, which reads the version from git.
The environment variable AUTOLR_FAST_BUILD says what is compiled: `auto` (default) is what there are compilers for,
`none`, `cpp` or `cuda` (with cpp) is an error if it cannot be done. TORCH_CUDA_ARCH_LIST is respected.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

SETTINGS = ("auto", "none", "cpp", "cuda")
# The oldest torch that the libraries load in: LibTorch's stable ABI of 2.11.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Every product and sum is rounded by itself, so that all backends have the same bits.
FLAGS = {
    "cxx": ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", *DEFINES],
    "nvcc": ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-DUSE_CUDA", *DEFINES],
}

if not find_spec("setuptools_scm"):  # setuptools would call the package 0.0.0, and say nothing
    sys.exit("autolr_fast: setuptools-scm cannot be imported, and reads the version: pip install setuptools-scm")

wanted = os.environ.get("AUTOLR_FAST_BUILD", "auto")
if wanted not in SETTINGS:
    sys.exit(f"AUTOLR_FAST_BUILD={wanted!r} is not known: use one of {', '.join(SETTINGS)}")


def skip(what: str, why: str, remedy: str, asked: bool) -> None:
    """Say what is not compiled; end if it was asked for by name."""
    message = f"autolr_fast: {what} is not compiled: {why}; {remedy}"
    if asked:
        sys.exit(message + f" (AUTOLR_FAST_BUILD={wanted} asks for it)")
    print(message, file=sys.stderr)


def find_cuda() -> Path | None:
    """Return the directory of the CUDA toolkit, if there is one."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    toolkits = [Path(place) for place in places if place]
    return next((path for path in toolkits if (path / "bin" / "nvcc").exists() and (path / "lib64").exists()), None)


def setup_arguments() -> dict:
    """Return the extensions and how they are built; nothing for pure Python."""
    if wanted == "none":
        return {}
    try:
        from torch.utils import cpp_extension  # noqa: PLC0415, absent in an isolated build
    except ImportError:
        skip("cpp", "torch cannot be imported here", "pip install --no-build-isolation .", wanted != "auto")
        return {}
    if not shutil.which(os.environ.get("CXX", "c++")):
        skip("cpp", "there is no C++ compiler", "install one, or name it in CXX", wanted != "auto")
        return {}

    def extension(name: str, source: str, **more: list[str]) -> Extension:
        keep = ["-Wl,--no-as-needed"] if sys.platform == "linux" else []
        directories = [*cpp_extension.library_paths(), *more.get("library_dirs", [])]
        return Extension(
            f"autolr_fast._{name}",
            [source],
            include_dirs=[*cpp_extension.include_paths(), *more.get("include_dirs", [])],
            library_dirs=directories,
            libraries=more.get("libraries", []),
            extra_compile_args=FLAGS,
            # libtorch brings libtorch_cuda where there is one, though no symbol of its own is used.
            extra_link_args=[*keep, "-ltorch_cpu", "-ltorch"],
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            py_limited_api=True,  # they use nothing of Python at all: torch.ops.load_library loads them
            optional=wanted == "auto",
        )

    extensions = [extension("cpp", "csrc/operators_cpu.cpp")]
    cuda = find_cuda()
    if cuda and wanted != "cpp":
        cpp_extension.CUDA_HOME = str(cuda)  # a torch without CUDA does not look for it, and need not have it
        # Never by what GPU is seen: the machine that builds need not be the one that runs.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        extensions.append(
            extension(
                "cuda",
                "csrc/operators_cuda.cu",
                include_dirs=[str(cuda / "include")],
                library_dirs=[str(cuda / "lib64")],
                libraries=["cudart_static", "dl", "rt", "pthread"],
            )
        )
    elif wanted != "cpp":
        skip("cuda", "there is no nvcc", "install the CUDA toolkit, or set CUDA_HOME", wanted == "cuda")

    class Build(cpp_extension.BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                skip(ext.name, f"the compiler failed ({error})", "see its messages above", wanted != "auto")

    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


setup(**setup_arguments(), options={"bdist_wheel": {"py_limited_api": "cp310"}})
