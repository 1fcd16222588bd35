import contextlib

import hypothesis
import pytest
import torch

from autolr_fast._evaluators import Graphed
from autolr_fast._steps import Pace

from .tape import TapeRecorder

hypothesis.settings.register_profile("plain", deadline=None, derandomize=True)
hypothesis.settings.load_profile("plain")


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where the tests' tensors are, if they do not say: cpu or cuda"
    )


def pytest_configure(config):
    """On a GPU, convolutions add up in one order and in full precision: much is compared bitwise."""
    config.addinivalue_line("markers", "cpu: is about the CPU, or something that torch has there alone")
    if (device := config.getoption("--device")) != "cpu":  # a default device has torch functions leave fused paths
        torch.set_default_device(device)
    torch.set_num_threads(1)  # threads that wait for each other take longer than operations this small
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _on_cpu(request):
    with torch.device("cpu") if request.node.get_closest_marker("cpu") else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _graphs_on_tape(monkeypatch):
    """There are no CUDA graphs of tensors on the CPU; of tensors on a GPU they are the real ones."""
    make_recorder = Graphed._make_recorder

    def make(self, model, line):
        on_cpu = all(parameter.device.type == "cpu" for parameter in line.parameters)
        return TapeRecorder() if on_cpu else make_recorder(self, model, line)

    monkeypatch.setattr(Graphed, "_make_recorder", make)


@pytest.fixture
def every_probe(monkeypatch):
    """No probe that is due is left out: the test is about what one sees or leaves, not about which are made."""
    monkeypatch.setattr(Pace, "leaves_out", lambda self, most=0: False)
