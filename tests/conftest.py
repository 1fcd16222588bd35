import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("plain", deadline=None, derandomize=True)
hypothesis.settings.load_profile("plain")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
