import itertools

import pytest
import torch

from autolr_fast._tree.optimizers import StackedSGD

pytestmark = pytest.mark.cpu
LRS = (0.1, 0.037, 1e-3)
SETTINGS = [
    settings
    for settings in (
        dict(zip(("momentum", "weight_decay", "dampening", "nesterov"), values, strict=True))
        for values in itertools.product((0.0, 0.9), (0.0, 0.013), (0.0, 0.1), (False, True))
    )
    if settings["momentum"] or not (settings["dampening"] or settings["nesterov"])
    if not (settings["dampening"] and settings["nesterov"])
]


def step_of_one(param, grad, buffer, *, first_step, lr, momentum, weight_decay, dampening, nesterov):
    """SGD of one model in place, in float32 or wider: every product and sum is rounded by itself."""
    wide = torch.promote_types(param.dtype, torch.float32)
    p, g, b = (tensor.to(wide) for tensor in (param, grad, buffer))
    if weight_decay:
        g = g + weight_decay * p
    if momentum:
        b = g if first_step else momentum * b + (1.0 - dampening) * g
        buffer.copy_(b)
        g = g + momentum * b if nesterov else b
    param.copy_(p - lr * g)


@pytest.mark.parametrize("most_elements", [1, 3000, 2**19], ids="at most {} elements at once".format)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stacked_sgd_rounds_as_one_model_after_another(dtype, settings, most_elements, monkeypatch):
    monkeypatch.setattr("autolr_fast._tree.optimizers._MOST_ELEMENTS", most_elements)
    shapes = ((257, 33), (64,), (), (0, 2), (8, 3, 5, 5))
    params = [torch.randn(len(LRS), *shape).to(dtype) for shape in shapes]
    params[-1] = params[-1].movedim(2, -1).contiguous().movedim(-1, 2)
    buffers = [torch.zeros_like(param) for param in params]
    expected, expected_buffers = ([tensor.clone() for tensor in tensors] for tensors in (params, buffers))
    rule = StackedSGD(**settings)
    for taken in range(3):
        grads = [torch.randn_like(param) for param in params]
        before = [grad.clone() for grad in grads]
        with torch.no_grad():
            rule.step(params, grads, [buffers] if rule.buffers else [], taken, LRS)
        assert all(map(torch.equal, grads, before))
        for stacked in zip(expected, grads, expected_buffers, strict=True):
            for k, lr in enumerate(LRS):
                step_of_one(*(tensor[k] for tensor in stacked), first_step=taken == 0, lr=lr, **settings)
        assert all(map(torch.equal, params, expected))
        assert all(map(torch.equal, buffers, expected_buffers))
