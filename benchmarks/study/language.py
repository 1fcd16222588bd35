"""Networks that predict the next character of a text."""

from __future__ import annotations

from torch import Tensor, nn

from ..models import CharacterTransformer
from .data import CHARACTERS, CONTEXT

__all__ = ["TextRNN", "text_transformer"]


class TextRNN(nn.Module):
    """A recurrent network that predicts the next character, [B, T] -> logits [B, T, characters].

    Args:
        layer: what recurs, an LSTM or a GRU.
        characters: size of the vocabulary.
        width: of the layer's state.
    """

    def __init__(self, layer: type[nn.LSTM | nn.GRU], characters: int = CHARACTERS, width: int = 128):
        super().__init__()
        self.characters = nn.Embedding(characters, width // 2)
        self.recurrent = layer(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits [B, T, characters] of text [B, T]."""
        return self.head(self.recurrent(self.characters(text))[0])


def text_transformer(dropout: float = 0.0) -> CharacterTransformer:
    """Return a small transformer for pieces of 64 characters."""
    return CharacterTransformer(CHARACTERS, width=64, layers=2, heads=2, context=CONTEXT, dropout=dropout)
