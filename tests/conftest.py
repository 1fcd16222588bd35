import hypothesis
import pytest
import torch

from autolr_fast.evaluators import Graphed

from .tape import TapeRecorder

hypothesis.settings.register_profile("plain", deadline=None, derandomize=True)
hypothesis.settings.load_profile("plain")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other take longer than operations this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _graphs_on_tape(monkeypatch):
    """There are no CUDA graphs of tensors on the CPU."""
    monkeypatch.setattr(Graphed, "_make_recorder", lambda *args: TapeRecorder())
