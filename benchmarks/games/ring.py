"""Generative adversarial networks that learn eight Gaussian modes on a ring."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from .players import Player, Setting, perceptron

__all__ = ["MODES", "figures", "gan", "real", "wgan"]

MODES = 8
_RADIUS, _DEVIATION = 1.0, 0.05
_NOISE, _WIDTH, _BATCH = 8, 64, 128
_CRITIC_STEPS, _PENALTY = 3, 0.3
_DRAWN = 4000  # samples that are judged
_COVERED = 0.25  # of a mode's fair share of the samples


def gan(setting: Setting) -> tuple[dict[str, float], list[Player]]:
    """Train by the non-saturating loss of Goodfellow et al. (2014), one step each a round."""
    generator, discriminator = _networks()
    both = nn.ModuleList([generator, discriminator])
    g_adam, d_adam = (Adam(network.parameters(), setting.lr, betas=(0.5, 0.999)) for network in both)
    g = Player("G", g_adam, both, setting.method, setting.steps)
    d = Player("D", d_adam, both, setting.method, setting.steps)
    for _ in range(setting.steps):
        x, z = real(_BATCH), torch.randn(_BATCH, _NOISE)
        d.move(
            lambda x=x, z=z: (
                F.softplus(-discriminator(x)).mean() + F.softplus(discriminator(generator(z).detach())).mean()
            )
        )
        z = torch.randn(_BATCH, _NOISE)
        g.move(lambda z=z: F.softplus(-discriminator(generator(z))).mean())
    return figures(_draw(generator)), [g, d]


def wgan(setting: Setting) -> tuple[dict[str, float], list[Player]]:
    """Train a Wasserstein GAN with gradient penalty (Gulrajani et al., 2017), three steps of the critic a round."""
    generator, critic = _networks()
    both = nn.ModuleList([generator, critic])
    g_adam, d_adam = (Adam(network.parameters(), setting.lr, betas=(0.0, 0.9)) for network in both)
    g = Player("G", g_adam, both, setting.method, setting.steps)
    d = Player("D", d_adam, both, setting.method, _CRITIC_STEPS * setting.steps)
    for _ in range(setting.steps):
        for _ in range(_CRITIC_STEPS):
            x, z = real(_BATCH), torch.randn(_BATCH, _NOISE)
            d.move(lambda x=x, z=z: _critic_loss(critic, x, generator(z).detach()))
        z = torch.randn(_BATCH, _NOISE)
        g.move(lambda z=z: -critic(generator(z)).mean())
    return figures(_draw(generator)), [g, d]


def _critic_loss(critic: nn.Module, x: Tensor, fake: Tensor) -> Tensor:
    share = torch.rand(len(x), 1)
    between = (share * x + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(x).mean() + _PENALTY * penalty


def _networks() -> tuple[nn.Module, nn.Module]:
    return perceptron(_NOISE, _WIDTH, 2, nn.ReLU), perceptron(2, _WIDTH, 1, partial(nn.LeakyReLU, 0.2))


def centers() -> Tensor:
    """Return the modes [8, 2]."""
    angles = 2 * math.pi * torch.arange(MODES) / MODES
    return _RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def real(count: int) -> Tensor:
    """Return samples [count, 2] of the ring."""
    return centers()[torch.randint(MODES, (count,))] + _DEVIATION * torch.randn(count, 2)


@torch.no_grad()
def _draw(generator: nn.Module) -> Tensor:
    return generator(torch.randn(_DRAWN, _NOISE))


def figures(samples: Tensor) -> dict[str, float]:
    """Return the modes covered, the share of samples near a mode, and the sliced Wasserstein distance.

    Args:
        samples: [B, 2].
    """
    distances = torch.cdist(samples, centers())
    near = distances < 3 * _DEVIATION
    shares = near.double().mean(dim=0)
    return {
        "modes of 8": float((shares > _COVERED / MODES).sum()),
        "near a mode, %": 100 * float(shares.sum()),
        "sliced distance": _sliced_distance(samples, real(len(samples))),
    }


def _sliced_distance(one: Tensor, other: Tensor) -> float:
    """Return the mean over directions of the distance (Wasserstein-1) of two clouds [B, 2] along them."""
    angles = math.pi * torch.arange(32) / 32
    directions = torch.stack([angles.cos(), angles.sin()])
    along = ((cloud @ directions).sort(dim=0).values for cloud in (one, other))
    return float(F.l1_loss(*along))
