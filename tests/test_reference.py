import math

import pytest
import torch
from torch import nn

from autolr_fast import reference


def quadratic():
    """Loss w**2 / 2 at w = 1, so that a step of f * lr leaves (1 - f * lr)**2 / 2."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    return model, lambda model: model.weight.square().sum() / 2


def test_quadratic_by_hand():
    model, loss = quadratic()
    losses = reference.candidate_losses(model, loss, lr=0.8, factors=[2.0, 1.0, 0.5])
    assert losses == pytest.approx([0.6**2 / 2, 0.2**2 / 2, 0.6**2 / 2])
    # min-max: 1, 0, 1; weights e^-1, 1, e^-1: the two outer factors cancel
    assert reference.propose_lr(model, loss, lr=0.8) == pytest.approx(0.8)
    # at lr 0.1 larger is better: losses .32, .405, .451; x = 0, .648, 1
    x = [0.0, (0.405 - 0.32) / (0.45125 - 0.32), 1.0]
    weights = [math.exp(-value) for value in x]
    expected = 0.1 * 2 ** ((weights[0] - weights[2]) / sum(weights))
    assert reference.propose_lr(model, loss, lr=0.1) == pytest.approx(expected)


def test_another_batch_judges():
    model, loss = quadratic()
    losses = reference.candidate_losses(model, loss, 0.5, [2.0, 1.0], probe_loss=lambda m: m.weight.sum())
    assert losses == pytest.approx([0.0, 0.5])


def test_model_is_untouched():
    model, loss = quadratic()
    loss(model).backward()
    reference.propose_lr(model, loss, lr=0.1)
    assert model.weight.item() == 1
    assert model.weight.grad.item() == 1
