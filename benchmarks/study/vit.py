"""A small vision transformer (Dosovitskiy et al. 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Block

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """A transformer of patches, whose mean is classified, images [B, 3, side, side] -> logits [B, classes].

    Args:
        classes: how many.
        side: of the images, in pixels.
        patch: side of a patch.
        width: of the residual stream.
        layers: number of blocks.
    """

    def __init__(self, classes: int, side: int = 16, patch: int = 4, width: int = 64, layers: int = 4):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch**2, width)
        self.places = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, 3, side, side]."""
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.embed(patches) + self.places)).mean(1))
