"""ResNet-18 as it is trained on 32 x 32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet18"]


class ResNet18(nn.Module):
    """ResNet-18 with the CIFAR stem: one 3x3 convolution of stride 1, and no max-pooling.

    He et al., "Deep Residual Learning for Image Recognition", with the widths of their ImageNet network; the
    stem is theirs for CIFAR-10. 11,173,962 parameters for 10 classes.

    Args:
        classes: number of logits.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
    """

    def __init__(self, classes: int, width: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        before = width
        for stage in range(4):
            after = width * 2**stage
            blocks.append(Block(before, after, stride=1 if stage == 0 else 2))
            blocks.append(Block(after, after, stride=1))
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of images [B, 3, H, W]."""
        features = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(features.mean((2, 3)))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, after, H / stride, W / stride] of x [B, before, H, W]."""
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))
