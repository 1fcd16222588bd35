import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autolr_fast._ops.buffer import StackedBuffer
from autolr_fast._optimizers import Optimizers
from autolr_fast._steps import GradientLine, StepLine, candidate_parameters

from .helpers import mlp

shapes = st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=6)


def write(prev, now, factor):
    parameter = nn.Parameter(now)
    out = torch.empty_like(now)
    StepLine({parameter: prev}, {parameter: "p"}, window=1).writer([now], [out.unsqueeze(0)])([factor])
    return out


@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, 0.1, 2e-2),
        (torch.float16, 1e-2, 4e-3),
    ],
)
def test_step_line(dtype, atol, rtol):
    prev, now = torch.randn(2, 129, dtype=torch.float64).to(dtype)
    assert torch.equal(write(prev, now, 0.0), prev)
    assert torch.equal(write(prev, now, 1.0), now)
    for factor in (0.125, 0.5, 2.0, 8.0, 1000.0):
        exact = prev.double() + factor * (now.double() - prev.double())
        torch.testing.assert_close(write(prev, now, factor).double(), exact, atol=atol * max(1, factor), rtol=rtol)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_gradient_line_by_hand(lr):
    model = nn.Linear(2, 1, bias=False)
    optimizers = Optimizers(torch.optim.SGD(model.parameters(), lr=lr))
    line = GradientLine(model, optimizers, lambda: model.weight.square().sum())
    out = [torch.empty(1, 2)]
    line.writer([model.weight.detach()], [row.unsqueeze(0) for row in out])([2.0])
    torch.testing.assert_close(out[0], model.weight.detach() * (1 - 2 * 0.1 * 2))
    assert model.weight.grad is None


def test_gradient_line_refuses_a_detached_loss():
    model = mlp()
    optimizers = Optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="detached"):
        GradientLine(model, optimizers, lambda: model(torch.ones(1, 5)).sum().detach())


@given(shapes, st.integers(1, 7))
def test_buffer_rows_are_disjoint_and_dense(shapes, rows):
    parameters = [torch.empty(shape, dtype=(torch.float32, torch.float64)[len(shape) % 2]) for shape in shapes]
    buffer = StackedBuffer(parameters, rows)
    for number, (stacked, parameter) in enumerate(zip(buffer.stacked, parameters, strict=True)):
        assert stacked.shape == (rows, *parameter.shape)
        assert stacked.dtype == parameter.dtype
        assert stacked.numel() == 0 or stacked.is_contiguous()
        stacked.fill_(number)
    for number, stacked in enumerate(buffer.stacked):  # a later fill would have spilled into an earlier one
        assert (stacked == number).all()
    storages = {(s.dtype, s.untyped_storage().data_ptr()) for s in buffer.stacked if s.numel()}
    assert len(storages) == len({s.dtype for s in buffer.stacked if s.numel()})


def test_buffer_keeps_strides():
    channels_last = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    transposed = torch.randn(3, 5).t()
    gapped = torch.randn(4, 6)[:, ::2]
    buffer = StackedBuffer([channels_last, transposed, gapped], rows=3)
    assert buffer.stacked[0][1].is_contiguous(memory_format=torch.channels_last)
    assert buffer.stacked[1][1].stride() == transposed.stride()
    assert buffer.stacked[2][1].is_contiguous()
    assert buffer.fits([channels_last, transposed, gapped], rows=2)
    assert not buffer.fits([channels_last, transposed, gapped], rows=4)
    assert not buffer.fits([channels_last, transposed], rows=3)


def test_parameters_in_optimizer_order_by_name():
    model = mlp()
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters()}]
    found = candidate_parameters(model, Optimizers(torch.optim.SGD(groups, lr=0.1)))
    assert list(found.values()) == ["2.weight", "2.bias", "0.weight", "0.bias"]
    assert list(found)[3] is model[0].bias


def test_foreign_model():
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\].*not a parameter of the model"):
        candidate_parameters(mlp(), Optimizers(torch.optim.SGD(mlp().parameters(), lr=0.1)))


def test_parameters_that_no_optimizer_holds_are_no_candidates():
    model = mlp()
    optimizers = Optimizers(torch.optim.SGD(model[0].parameters(), lr=0.1))
    assert list(candidate_parameters(model, optimizers).values()) == ["0.weight", "0.bias"]


def test_complex_and_sparse_parameters():
    model = nn.ParameterDict({"z": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    with pytest.raises(TypeError, match="'z' is torch.complex64.*view_as_real"):
        candidate_parameters(model, Optimizers(torch.optim.SGD(model.parameters(), lr=0.1)))
    model = nn.ParameterDict({"s": nn.Parameter(torch.eye(2).to_sparse())})
    with pytest.raises(TypeError, match="'s' is .*torch.sparse_coo"):
        candidate_parameters(model, Optimizers(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_parameter_changed_within_the_window():
    parameter = nn.Parameter(torch.ones(3))
    prev = {parameter: torch.ones(3)}
    parameter.data = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'w' was \(\[3\], torch.float32.*before training"):
        StepLine(prev, {parameter: "w"}, window=1)
