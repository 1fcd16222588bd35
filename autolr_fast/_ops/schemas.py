"""The operators: one schema each, declared here alone, with an overload for each backend.

``torch.ops.autolr_fast.stack_candidates.cpp`` is ``stack_candidates`` by the backend ``cpp``. All of them write
into tensors that they are given and return nothing, so there is nothing to fake.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["BACKENDS", "LIBRARY", "SCHEMAS", "overload"]

BACKENDS: tuple[str, ...] = ("cuda", "triton", "cpp", "torch")

SCHEMAS: dict[str, str] = {
    # prev_i, now_i [*shape_i] -> out_i [N, *shape_i]: prev + f * (now - prev)
    "stack_candidates": "(Tensor[] prev, Tensor[] now, float[] factors, Tensor(a!)[] out) -> ()",
    # now_i, grad_i [*shape_i], lr [P] float64 -> out_i [N, *shape_i]: now - f * lr_i * grad
    "stack_gradient_candidates": "(Tensor[] now, Tensor[] grad, Tensor lr, float[] factors, "
    "Tensor(a!)[] out) -> ()",
}

LIBRARY = torch.library.Library("autolr_fast", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in SCHEMAS.items():
    for _backend in BACKENDS:
        LIBRARY.define(f"{_name}.{_backend}{_schema}")  # type: ignore[no-untyped-call]


def overload(operator: str, backend: str) -> Any:
    """Return ``torch.ops.autolr_fast.<operator>.<backend>``."""
    return getattr(getattr(torch.ops.autolr_fast, operator), backend)
