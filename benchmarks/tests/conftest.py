"""What the tests of the benchmarks begin with; they need pip install '.[dev]'."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Threads that wait for each other take longer than operations this small."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer than 8 channels in channels_last, oneDNN of torch 2.13 overruns its memory on some CPUs."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
