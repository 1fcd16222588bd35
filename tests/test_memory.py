import pytest
import torch

from autolr_fast._machine.memory import SMALL, are_small


@pytest.mark.parametrize(("elements", "expected"), [(SMALL // 8, True), (SMALL // 8 + 1, False)])
def test_sizes_add_up(elements, expected):
    assert are_small([torch.empty(elements), torch.empty(2 * elements, dtype=torch.bfloat16)]) is expected


def test_a_gpu_has_room_for_more(monkeypatch):
    """A hundredth of its memory; on tensors without any, on a device that here stands for a GPU."""
    monkeypatch.setattr(
        "autolr_fast._machine.memory._gpu_memory", lambda device: 100 * 5 * SMALL * (device.type == "meta")
    )
    assert are_small([torch.empty(SMALL, 5, dtype=torch.uint8, device="meta")])
    assert not are_small([torch.empty(SMALL, 5, dtype=torch.uint8, device="meta"), torch.empty(1, device="meta")])
    assert not are_small([torch.empty(1, device="meta"), torch.empty(SMALL)])
