"""The operators: one schema each, declared here alone, with an overload for each backend.

``torch.ops.autolr_fast.stack_candidates.cpp`` is ``stack_candidates`` by the backend ``cpp``. Those of ``SCHEMAS``
write into tensors that they are given and return nothing, so there is nothing to fake. Where one would be called
again and again, ``plan`` does once what does not depend on the factors, and ``write`` the rest.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["BACKENDS", "LIBRARY", "PLANNED", "PLANNERS", "SCHEMAS", "overload"]

BACKENDS: tuple[str, ...] = ("cuda", "triton", "cpp", "torch")

SCHEMAS: dict[str, str] = {
    # prev_i, now_i [*shape_i] -> out_i [N, *shape_i]: prev + f * (now - prev)
    "stack_candidates": "(Tensor[] prev, Tensor[] now, float[] factors, Tensor(a!)[] out) -> ()",
    # now_i, grad_i [*shape_i], lr [P] float64 -> out_i [N, *shape_i]: now - f * lr_i * grad
    "stack_gradient_candidates": "(Tensor[] now, Tensor[] grad, Tensor lr, float[] factors, "
    "Tensor(a!)[] out) -> ()",
}

PLANNERS: tuple[str, ...] = ("cuda", "triton", "cpp")
"""Backends that write by a plan; ``torch`` has nothing to do beforehand."""

PLANNED: dict[str, str] = {
    # The addresses of what either of the others is given, checked: of `now, grad` with lr, of `prev, now` without.
    # Nothing if the tensors are not of one dtype and device, dense, and laid out alike. Fake tensors have none.
    "plan": "(Tensor[] first, Tensor[] second, Tensor? lr, Tensor[] out) -> Tensor[]",
    # Writes all of the plan's `out`, of which it is given one: the schema cannot name the others.
    "write": "(Tensor[] plan, float[] factors, Tensor(a!) out) -> ()",
}

LIBRARY = torch.library.Library("autolr_fast", "DEF")  # type: ignore[no-untyped-call]
for _schemas, _backends in ((SCHEMAS, BACKENDS), (PLANNED, PLANNERS)):
    for _name, _schema in _schemas.items():
        for _backend in _backends:
            LIBRARY.define(f"{_name}.{_backend}{_schema}")  # type: ignore[no-untyped-call]


def overload(operator: str, backend: str) -> Any:
    """Return ``torch.ops.autolr_fast.<operator>.<backend>``."""
    return getattr(getattr(torch.ops.autolr_fast, operator), backend)
