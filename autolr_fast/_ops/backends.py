"""Which backend serves which device, and why.

``cuda`` and ``cpp`` are compiled when the package is installed, ``triton`` compiles itself where Triton is
installed, ``torch`` is plain PyTorch. The first of a device's list that can serve it does, unless a backend is
asked for by name: by the ``backend`` argument of an operator, or by the environment variable
``AUTOLR_FAST_BACKEND``. One asked for by name never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch

from .schemas import BACKENDS

__all__ = ["VARIABLE", "BackendError", "Choice", "choose", "explain"]

VARIABLE = "AUTOLR_FAST_BACKEND"
_ORDER: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}
_COMPILE = "pip install --no-build-isolation ."
# backend -> (why there is none, what to do)
_INSTALL: dict[str, tuple[str, str]] = {
    "cuda": ("the package was installed without compiling it; with nvcc", _COMPILE),
    "triton": ("Triton is not installed", "pip install --upgrade triton"),
    "cpp": ("the package was installed without compiling it; with a C++ compiler", _COMPILE),
}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve; says why, and which there are."""


class Choice(NamedTuple):
    """A backend and its standing: ``reason`` is empty if it can serve, else it says why not and what to do."""

    backend: str
    reason: str


def choose(device_type: str, backend: str | None = None) -> str:
    """Return the name of the backend that serves a device.

    Args:
        device_type: ``torch.device.type`` of the tensors.
        backend: one asked for by name; ``None`` for ``AUTOLR_FAST_BACKEND``, or the first that can serve.

    Raises:
        BackendError: if the one asked for cannot serve the device.

    Example:
        >>> choose("meta"), choose("cpu", "torch")
        ('torch', 'torch')
    """
    asked, source = (backend, "backend") if backend is not None else (os.environ.get(VARIABLE), VARIABLE)
    if not asked:
        return next(choice.backend for choice in explain(device_type) if not choice.reason)
    if reason := _why_not(asked, device_type):
        known = ", ".join(choice.backend for choice in explain(device_type) if not choice.reason)
        raise BackendError(f"{source}={asked!r} cannot serve {device_type}: {reason}. What can here: {known}")
    return asked


def explain(device_type: str) -> list[Choice]:
    """Return the backends of a device in the order of preference, each with why it cannot serve."""
    order = _ORDER.get(device_type, ("torch",))
    return [Choice(backend, _why_not(backend, device_type)) for backend in order]


def _why_not(backend: str, device_type: str) -> str:
    if backend == "torch":
        return ""
    if backend not in BACKENDS:
        return f"there is no backend of that name, only {', '.join(BACKENDS)}"
    interpreted = backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend not in _ORDER.get(device_type, ()) and not interpreted:
        return f"it serves {' and '.join(device for device, order in _ORDER.items() if backend in order)} only"
    return _load(backend)


@functools.cache
def _load(backend: str) -> str:
    """Load a backend at the first call; return why it cannot be, or nothing."""
    if backend == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA: install a build with it"
    found = importlib.util.find_spec("triton" if backend == "triton" else f"autolr_fast._{backend}")
    missing, remedy = _INSTALL[backend]
    if found is None:
        return f"{missing}: {remedy}"
    try:
        if backend == "triton":
            importlib.import_module("autolr_fast._ops.triton")
        else:
            torch.ops.load_library(found.origin)  # type: ignore[no-untyped-call]
    except Exception as error:
        # torch raises an OSError of its own from that of the loader, which says why.
        reason = f"{error.__cause__ or error}; install it again, for this torch: {remedy}"
        warnings.warn(
            f"autolr_fast goes on without its backend {backend!r}, which does not load: {reason}", stacklevel=2
        )
        return reason
    return ""
