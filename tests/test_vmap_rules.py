import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from autolr_fast._evaluators.vmap_rules import FusedLayers, attention, batch_norm, dropout_mask, linear


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


def one_by_one(function, *inputs):
    """The results for each of three models and their gradients, each from the same random numbers."""
    results = []
    for k in range(3):
        with torch.random.fork_rng():
            results.append(function(*(x[k] if x.dim() and len(x) == 3 else x for x in inputs)))
    return torch.stack(results)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("lies", ["contiguous", "channels-last", "transposed"])
def test_dropout_of_three_models_has_the_mask_of_each(lies, inplace):
    x = torch.randn(3, 4, 2, 5, 6, requires_grad=True)
    if lies != "contiguous":
        x = x.movedim(2, 4) if lies == "channels-last" else x.transpose(1, 3)
    results = [one_by_one(lambda x: F.dropout(x, 0.4), x)]
    with FusedLayers():
        results.append(torch.vmap(lambda x: F.dropout(x * 1, 0.4, inplace=inplace), randomness="same")(x))
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in results]
    assert torch.equal(*results)
    assert torch.equal(*gradients)
    assert 0.3 < (results[0] == 0).double().mean() < 0.5


def test_dropout_of_what_three_models_share():
    x, w = torch.randn(5, 6), torch.randn(3, 6)
    with torch.random.fork_rng():
        expected = F.dropout(x, 0.4)
    with FusedLayers():
        out = torch.vmap(lambda w: F.dropout(x, 0.4) * w, randomness="same")(w)
    torch.testing.assert_close(out, expected * w.unsqueeze(1))


def test_no_dropout_in_eval_mode():
    x = torch.randn(3, 4)
    with FusedLayers():
        assert torch.equal(torch.vmap(lambda x: F.dropout(x, 0.4, training=False), randomness="same")(x), x)


@pytest.mark.parametrize("lead", [(), (2,), (2, 4)], ids=str)
@pytest.mark.parametrize("mask", [None, (5, 7), "all", "rows"], ids=str)
@pytest.mark.parametrize("batched", ["qkv", "q", "kv", "qkvm", "m"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_of_three_models(lead, mask, batched, p):
    shapes = {"q": (*lead, 5, 6), "k": (*lead, 7, 6), "v": (*lead, 7, 6)}
    if mask is not None:
        of_row = (*lead[:1], *[1] * len(lead[1:]))
        shapes["m"] = {"all": (*lead, 5, 7), "rows": (*of_row, 5, 7)}.get(mask, mask)
    if not set(batched) <= set(shapes):
        pytest.skip("there is no mask")
    values = [torch.randn(*[3] * (name in batched), *of, dtype=torch.float64) for name, of in shapes.items()]
    dims = tuple(0 if name in batched else None for name in shapes)
    with FusedLayers(), torch.random.fork_rng(), torch.no_grad():
        together = torch.vmap(
            lambda q, k, v, m=None: F.scaled_dot_product_attention(q, k, v, m, p, scale=0.7),
            in_dims=dims,
            randomness="same",
        )(*values)
    alone = []
    for index in range(3):
        q, k, v, *m = (value if dim is None else value[index] for value, dim in zip(values, dims, strict=True))
        with torch.random.fork_rng():
            alone.append(F.scaled_dot_product_attention(q, k, v, *m or [None], p, scale=0.7))
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("q", "k", "v", "mask"),
    [
        ((1, 4, 5, 6), (3, 4, 7, 6), (3, 4, 7, 6), None),
        ((3, 4, 5, 6), (1, 4, 7, 6), (1, 4, 7, 6), None),
        ((4, 5, 6), (3, 4, 7, 6), (3, 4, 7, 6), None),
        ((5, 6), (3, 7, 6), (3, 7, 6), None),
        ((4, 5, 6), (4, 5, 6), (4, 5, 6), causal_lower_right(5, 5)),
    ],
)
def test_attention_that_broadcasts(q, k, v, mask):
    q, k, v = (torch.randn(3, *shape, dtype=torch.float64) for shape in (q, k, v))
    call = lambda *args: F.scaled_dot_product_attention(*args, attn_mask=mask)  # noqa: E731
    with FusedLayers(), torch.no_grad():
        torch.testing.assert_close(torch.vmap(call)(q, k, v), one_by_one(call, q, k, v))


def test_vmap_says_how_random_dropout_is():
    x = torch.ones(3, 50)
    attend = lambda x: F.scaled_dot_product_attention(*[x.view(5, 10)] * 3, dropout_p=0.5)  # noqa: E731
    for call in (lambda x: F.dropout(x, 0.5), attend):
        with FusedLayers(), torch.no_grad():
            y = torch.vmap(call, randomness="different")(x)
            assert not torch.equal(y[0], y[1])
            y = torch.vmap(call, randomness="same")(x)
            assert torch.equal(y[0], y[1])
            with pytest.raises(RuntimeError, match="random"):
                torch.vmap(call)(x)


def test_causal_attention_with_fewer_keys_than_queries_of_three_models():
    q, k, v = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 2, 5, 6), torch.randn(3, 2, 2, 5, 6)
    call = lambda *args: F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True)  # noqa: E731
    with FusedLayers(), torch.no_grad():
        torch.testing.assert_close(torch.vmap(call)(q, k, v), one_by_one(call, q, k, v))


def test_autocast_keeps_its_own():
    x, w = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
    q, k, v = torch.randn(3, 3, 2, 5, 6)
    call = lambda *args: F.scaled_dot_product_attention(*args)  # noqa: E731
    with torch.autocast(x.device.type, dtype=torch.bfloat16), torch.no_grad():
        with FusedLayers():
            y = torch.vmap(lambda *args: F.linear(*args))(x, w)
            z = torch.vmap(call)(q, k, v)
        assert y.dtype == z.dtype == torch.bfloat16
        torch.testing.assert_close(z, one_by_one(call, q, k, v))


def test_outside_of_vmap_it_is_the_layer():
    x = torch.randn(6, 4, requires_grad=True)
    with FusedLayers():
        out = F.batch_norm(x, None, None, training=True)
    assert torch.equal(out, F.batch_norm(x, None, None, training=True))
    out.sum().backward()
    for operator, arguments in (
        (batch_norm, (torch.randn(6, 4), torch.zeros(4), torch.ones(4), None, None, True, 0.1, 1e-5)),
        (linear, (torch.randn(6, 4), torch.randn(3, 4), None)),
        (dropout_mask, (torch.randn(6, 4), 0.5)),
        (attention, (*torch.randn(3, 2, 6, 4), None, 0.0, True)),
    ):
        checked = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checked.values()) == {"SUCCESS"}
