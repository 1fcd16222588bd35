"""A small masked autoencoder: a transformer that fills in what it was not shown of images (He et al. 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Block

__all__ = ["MaskedAutoencoder", "filling_loss"]


def filling_loss(model: nn.Module, images: Tensor, _: Tensor) -> Tensor:
    """Return the squared error on the patches that the network was not shown."""
    filled, patches = model(images)
    return F.mse_loss(filled, patches)


class MaskedAutoencoder(nn.Module):
    """An encoder of the patches that are shown and a decoder of all, images [B, 3, side, side] -> hidden patches.

    Args:
        side: of the images, in pixels.
        patch: side of a patch.
        shown: share of the patches that the encoder sees.
        width: of the encoder.
        narrow: width of the decoder.
    """

    def __init__(self, side: int = 16, patch: int = 2, shown: float = 0.25, width: int = 64, narrow: int = 32):
        super().__init__()
        count, pixels = (side // patch) ** 2, 3 * patch**2
        self.patch = patch
        self.shown = int(shown * count)
        self.embed = nn.Linear(pixels, width)
        self.places: Tensor
        self.register_buffer("places", _positions(side // patch, width))
        self.encoder = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(2)), nn.LayerNorm(width))
        self.enter = nn.Linear(width, narrow)
        self.hidden = nn.Parameter(0.02 * torch.randn(narrow))
        self.decoder_places: Tensor
        self.register_buffer("decoder_places", _positions(side // patch, narrow))
        self.decoder = nn.Sequential(Block(narrow, 4, causal=False), nn.LayerNorm(narrow))
        self.leave = nn.Linear(narrow, pixels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the hidden patches are taken for and what they are, [B, hidden, pixels] each.

        Which are shown is drawn from the global random stream, for each image.
        """
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        order = torch.rand(patches.shape[:2]).argsort(dim=1)
        shown, hidden = order[:, : self.shown], order[:, self.shown :]
        encoded = self.enter(self.encoder(self.embed(_take(patches, shown)) + self.places[shown]))
        unknown = self.hidden.expand(*hidden.shape, -1)
        decoded = self.decoder(torch.cat([encoded, unknown], dim=1) + self.decoder_places[order])
        return self.leave(decoded[:, self.shown :]), _take(patches, hidden)


def _positions(side: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, [side * side, width]."""
    frequencies = math.pi * (1 / side) ** torch.linspace(0, 1, width // 4)
    waves = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([waves.sin(), waves.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)


def _take(patches: Tensor, places: Tensor) -> Tensor:
    return patches.gather(1, places[:, :, None].expand(-1, -1, patches.shape[2]))
