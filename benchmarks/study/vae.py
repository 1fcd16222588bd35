"""A small variational autoencoder of digits (Kingma and Welling 2013)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VAE", "bound_loss"]


def bound_loss(model: nn.Module, images: Tensor, _: Tensor) -> Tensor:
    """Return what bounds the negative log-likelihood of images [B, 1, 8, 8], in nats an image.

    It is the cross-entropy of the pixels, grey ones counted as shares of black and white, and the divergence of the
    code from a standard normal one.
    """
    logits, mean, log_variance = model(images)
    pixels = F.binary_cross_entropy_with_logits(logits, images.flatten(1), reduction="sum")
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    return (pixels + divergence) / len(images)


class VAE(nn.Module):
    """An encoder to the mean and the variance of a code, and a decoder of a code that is drawn from these.

    Args:
        pixels: in an image.
        width: of the hidden layers.
        code: length of the code.
    """

    def __init__(self, pixels: int = 64, width: int = 128, code: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, pixels], mean [B, code] and log-variance [B, code] of images [B, 1, H, W].

        The code is drawn from the global random stream.
        """
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance
