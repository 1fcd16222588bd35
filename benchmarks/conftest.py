"""Keeps in pytest-benchmark's JSON why a row is missing."""

from __future__ import annotations

from typing import Any

import pytest

Refusals = list[dict[str, Any]]
_REFUSED = pytest.StashKey[Refusals]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin with none."""
    config.stash[_REFUSED] = []


@pytest.fixture
def refusals(request: pytest.FixtureRequest) -> Refusals:
    """Rows that could not be measured; a test appends to it before it skips."""
    return request.config.stash[_REFUSED]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Write them next to the benchmarks."""
    output_json["refused"] = config.stash[_REFUSED]
