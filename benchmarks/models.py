"""The networks that are measured, besides the demo's and ResNet-18."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Adapted", "Block", "CharacterTransformer", "mlp", "perceptron", "small_convnet", "wide_mlp"]


def mlp() -> nn.Sequential:
    """Return a perceptron, [B, 512] -> logits [B, 16]; 201,232 parameters."""
    return nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16))


def perceptron() -> nn.Sequential:
    """Return a perceptron of three hidden layers, [B, 256] -> logits [B, 10]; 199,946 parameters."""
    hidden = [module for _ in range(3) for module in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(256, 10))


def small_convnet() -> nn.Sequential:
    """Return a network of two convolutions without BatchNorm, [B, 1, 8, 8] -> logits [B, 10]; 1,418 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def wide_mlp(width: int = 2048, layers: int = 12) -> nn.Sequential:
    """Return a perceptron next to whose parameters its activations are nothing, [B, width] -> [B, width].

    50,356,224 parameters.
    """
    return nn.Sequential(*(module for _ in range(layers) for module in (nn.Linear(width, width), nn.ReLU())))


class CharacterTransformer(nn.Module):
    """A decoder-only transformer with layer norm before each part; 10.7 M parameters for 65 characters.

    Args:
        characters: size of the vocabulary.
        width: of the residual stream.
        layers: number of blocks.
        heads: of the attention.
        context: longest sequence.
        dropout: share of the embeddings, of the attention and of what each part adds that is dropped.
    """

    def __init__(
        self,
        characters: int,
        width: int = 384,
        layers: int = 6,
        heads: int = 6,
        context: int = 128,
        *,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = _dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits [B, T, characters] of text [B, T]."""
        positions = torch.arange(text.shape[1], device=text.device)
        embedded = self.dropout(self.characters(text) + self.positions(positions))
        return self.head(self.norm(self.blocks(embedded)))


class Block(nn.Module):
    """Attention and a perceptron, [B, T, width] -> [B, T, width].

    Args:
        width: of the residual stream.
        heads: of the attention.
        dropout: share of the attention and of what each part adds that is dropped.
        causal: whether a place attends only to those up to it.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = True):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.attention_dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = _dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with what the block adds to it."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=self.causal)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Adapted(nn.Module):
    """A linear layer that stays, and a product of two thin matrices that is added to it; nothing at first.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.

    Args:
        layer: what stays.
        rank: of the product.
        scale: by which it is multiplied.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.layer = layer
        self.scale = scale
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., outputs] of [..., inputs]."""
        return self.layer(x) + self.scale * self.up(self.down(x))


def _dropout(share: float) -> nn.Module:
    return nn.Dropout(share) if share else nn.Identity()
