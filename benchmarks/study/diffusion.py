"""A small diffusion model of images: a network that predicts the noise in them (Ho et al. 2020)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NoisePredictor", "denoising_loss"]

_GROUPS = 8


def denoising_loss(model: nn.Module, images: Tensor, _: Tensor) -> Tensor:
    """Return the squared error of the predicted noise, at times and with noise of the global random stream.

    An image at time t in [0, 1] is ``cos(pi t / 2) image + sin(pi t / 2) noise`` (Nichol and Dhariwal 2021).
    """
    times = torch.rand(len(images))
    noise = torch.randn_like(images)
    angles = (math.pi / 2 * times)[:, None, None, None]
    return F.mse_loss(model(angles.cos() * images + angles.sin() * noise, times), noise)


class NoisePredictor(nn.Module):
    """A U-Net of two scales, images [B, 3, H, W] and times [B] -> noise [B, 3, H, W].

    Args:
        width: channels at half the resolution of the images; twice as many at a quarter.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 1000 ** torch.linspace(0, 1, width // 2))
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU())
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.before = TimedBlock(width, width, 2 * width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = TimedBlock(2 * width, 2 * width, 2 * width)
        self.after = TimedBlock(3 * width, width, 2 * width)
        self.leave = nn.Sequential(nn.GroupNorm(_GROUPS, width), nn.SiLU(), nn.Conv2d(width, 12, 3, padding=1))

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """Return the noise that is in the images."""
        angles = times[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        fine = self.before(self.enter(F.pixel_unshuffle(images, 2)), time)
        coarse = F.interpolate(self.middle(self.down(fine), time), scale_factor=2)
        return F.pixel_shuffle(self.leave(self.after(torch.cat([fine, coarse], dim=1), time)), 2)


class TimedBlock(nn.Module):
    """Two convolutions with group norm, what the time adds between them, and what goes past them.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        time: length of the embedding of the time.
    """

    def __init__(self, inputs: int, outputs: int, time: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, inputs)
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(_GROUPS, outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.past = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return [B, outputs, H, W] of x [B, inputs, H, W] and embedded times [B, time]."""
        inner = self.convolution1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.past(x) + self.convolution2(F.silu(self.norm2(inner)))
