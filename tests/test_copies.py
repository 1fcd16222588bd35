import pytest
import torch
from torch import nn

from autolr_fast._ops.copies import Copies


class Marked(torch.Tensor):
    """A subclass that has no function for many tensors at once."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "foreach" in func.__name__:
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_tensors_of_all_kinds_go_back_bit_for_bit(count):
    kinds = [
        lambda: torch.randn(3, 4),
        lambda: torch.randn(4, 3).t(),
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(3, 8)[:, ::2],
        lambda: torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16),
        lambda: torch.randint(9, ()),
        lambda: torch.rand(5) < 0.5,
        lambda: torch.empty(0, 2),
        lambda: nn.Parameter(torch.randn(2, 2)),
        lambda: torch.randn(2, dtype=torch.complex64),
        lambda: torch.randn(3).as_subclass(Marked),
    ]
    tensors = [make() for make in kinds for _ in range(count)]
    before = [(tensor.detach().clone(), tensor.stride(), tensor.data_ptr()) for tensor in tensors]
    copies = Copies(tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    copies.restore()
    for tensor, value, (expected, stride, address) in zip(tensors, copies.values, before, strict=True):
        assert (tensor.stride(), tensor.data_ptr()) == (stride, address)
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
        assert not value.requires_grad
