import pytest
import torch
import torch.nn.functional as F

from autolr_fast.layers import FusedLayers, batch_norm, linear


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (3, 4, 5, 5)])
@pytest.mark.parametrize("shared", [(), ("x",), ("weight", "bias"), ("running_mean", "running_var")])
@pytest.mark.parametrize("absent", [(), ("weight", "bias"), ("running_mean", "running_var")])
def test_batch_norm_of_three_models(shape, training, shared, absent):
    """Outputs, gradients and statistics as those of one after another."""
    sizes = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), (4,))
    values = {name: torch.rand(size, dtype=torch.float64) + 0.5 for name, size in {"x": shape, **sizes}.items()}
    values = {
        name: value if name in shared else torch.stack([value * scale for scale in (1.0, 2.0, 3.0)])
        for name, value in values.items()
    }
    values = {name: None if name in absent else value for name, value in values.items()}
    if training and "running_mean" in shared:
        pytest.skip("statistics that all models share cannot be written to")
    if not training and "running_mean" in absent:
        pytest.skip("there is nothing to normalise by")
    leaves = [name for name in ("x", "weight", "bias") if values[name] is not None]
    dims = [None if value is None or name in shared else 0 for name, value in values.items()]

    def run(of):
        of = {name: None if value is None else value.clone() for name, value in of.items()}
        for name in leaves:
            of[name].requires_grad_()
        return of

    together = run(values)
    with FusedLayers():
        out = torch.vmap(lambda *args: F.batch_norm(*args, training, 0.2, 1e-3), in_dims=tuple(dims))(
            *together.values()
        )
    out.square().sum().backward()
    alone = [
        run({n: v if d is None else v[k] for (n, v), d in zip(values.items(), dims, strict=True)}) for k in range(3)
    ]
    for k, of in enumerate(alone):
        expected = F.batch_norm(*of.values(), training, 0.2, 1e-3)
        torch.testing.assert_close(out[k], expected)
        expected.square().sum().backward()
        for name, dim in zip(values, dims, strict=True):
            if dim == 0:
                torch.testing.assert_close(together[name][k], of[name])
    for name in leaves:
        gradients = torch.stack([of[name].grad for of in alone])
        expected = gradients.sum(0) if name in shared else gradients
        torch.testing.assert_close(together[name].grad, expected)


@pytest.mark.parametrize("shape", [(4,), (6, 4), (3, 6, 4), (2, 3, 6, 4)])
@pytest.mark.parametrize("batched", ["xwb", "xw", "wb", "w", "xb", "x", "b"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("out", [5, None])
def test_linear_of_three_models(shape, batched, has_bias, out):
    if (batched == "b" and not has_bias) or (out is None and has_bias):
        pytest.skip("there is nothing to batch, or no such layer")
    shapes = {"x": shape, "w": (4,) if out is None else (out, 4), "b": (5,) if has_bias else None}
    values = {
        name: None if of is None else torch.randn(*[3] * (name in batched), *of, dtype=torch.float64)
        for name, of in shapes.items()
    }
    dims = tuple(0 if name in batched and values[name] is not None else None for name in values)
    leaves = [value.requires_grad_() for value in values.values() if value is not None]
    results = []
    for function in (torch.vmap(F.linear, in_dims=dims), None):
        if function is None:
            parts = [
                F.linear(*(v if d is None else v[k] for v, d in zip(values.values(), dims, strict=True)))
                for k in range(3)
            ]
            y = torch.stack(parts)
        else:
            with FusedLayers():
                y = torch.vmap(lambda *args: F.linear(*args), in_dims=dims)(*values.values())
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradients_of_weights_lie_as_the_weights_do():
    x, w, b = torch.randn(3, 6, 4), torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 5)
    with FusedLayers():
        y = torch.vmap(lambda *args: F.linear(*args))(x, w, b)
    (gradient,) = torch.autograd.grad(y.square().sum(), [w])
    assert gradient.is_contiguous()


def test_autocast_keeps_its_own():
    x, w = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), FusedLayers():
        y = torch.vmap(lambda *args: F.linear(*args))(x, w)
    assert y.dtype == torch.bfloat16


def test_outside_of_vmap_it_is_the_layer():
    x = torch.randn(6, 4, requires_grad=True)
    with FusedLayers():
        out = F.batch_norm(x, None, None, training=True)
    assert torch.equal(out, F.batch_norm(x, None, None, training=True))
    out.sum().backward()
    for operator, arguments in (
        (batch_norm, (torch.randn(6, 4), torch.zeros(4), torch.ones(4), None, None, True, 0.1, 1e-5)),
        (linear, (torch.randn(6, 4), torch.randn(3, 4), None)),
    ):
        checked = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checked.values()) == {"SUCCESS"}
