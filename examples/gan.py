"""A GAN: the generator and the discriminator have an optimizer and an AutoLR each.

Run ``python -m examples.gan``. The generator learns to draw points in eight small clouds on a circle.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR

LATENT, BATCH, CLOUDS, RADIUS = 8, 128, 8, 0.05
ANGLES = 2 * math.pi * torch.arange(CLOUDS) / CLOUDS
CENTERS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def main(rounds=800, lr=1e-6):
    """Train by the non-saturating loss, and print how many of the clouds the generator draws."""
    torch.manual_seed(0)
    generator, discriminator = perceptron(LATENT, 2), perceptron(2, 1)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=lr, betas=(0.5, 0.999))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=(0.5, 0.999))
    g_scheduler = AutoLR(g_optimizer, generator, total_steps=rounds)
    d_scheduler = AutoLR(d_optimizer, discriminator, total_steps=rounds)

    for _ in range(rounds):
        x = CENTERS[torch.randint(CLOUDS, (BATCH,))] + RADIUS * torch.randn(BATCH, 2)
        fake = generator(torch.randn(BATCH, LATENT)).detach()
        d_optimizer.zero_grad()
        loss = d_scheduler.loss(lambda: (F.softplus(-discriminator(x)) + F.softplus(discriminator(fake))).mean())
        loss.backward()
        d_optimizer.step()
        d_scheduler.step()  # each AutoLR after its own optimizer

        z = torch.randn(BATCH, LATENT)
        g_optimizer.zero_grad()
        loss = g_scheduler.loss(lambda: F.softplus(-discriminator(generator(z))).mean())
        loss.backward()
        g_optimizer.step()
        g_scheduler.step()

    with torch.no_grad():
        is_near = torch.cdist(generator(torch.randn(4000, LATENT)), CENTERS) < 3 * RADIUS
    shares = is_near.double().mean(dim=0)
    drawn = (shares > 0.25 / CLOUDS).sum()  # those with a quarter of their fair share
    print(f"{drawn} of {CLOUDS} clouds drawn, {shares.sum():.0%} of the points are in a cloud")


def perceptron(inputs, outputs):
    """Return a network with two hidden layers."""
    hidden = [nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


if __name__ == "__main__":
    main()
