"""Operators on all parameters at once: one call for each (device, dtype), by the fastest backend."""

from .backends import VARIABLE, BackendError, choose, explain
from .writers import (
    Writer,
    candidate_writer,
    gradient_candidate_writer,
    write_candidate,
    write_gradient_candidate,
)

__all__ = [
    "VARIABLE",
    "BackendError",
    "Writer",
    "candidate_writer",
    "choose",
    "explain",
    "gradient_candidate_writer",
    "write_candidate",
    "write_gradient_candidate",
]
