"""What the tests of the benchmarks begin with; they need pip install '.[dev]'."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Threads that wait for each other take longer than operations this small.

    With fewer than 8 channels in channels_last, oneDNN of torch 2.13 overruns its memory on some CPUs.
    """
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
