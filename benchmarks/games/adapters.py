"""Low-rank adapters (Hu et al., 2021) on a small transformer that knows nothing of their data."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..models import Adapted, CharacterTransformer
from .players import Player, Setting

__all__ = ["adapt"]

_TOKENS, _NEXT, _CONTEXT = 64, 4, 32
_SEQUENCES, _JUDGED = 32, 256
_RANK, _SCALE = 4, 2.0  # the scale is alpha / rank
_PRETRAINING_LR = 3e-3
_SHIFT = 1


def adapt(setting: Setting) -> tuple[dict[str, float], list[Player]]:
    """Pretrain on one Markov chain for twice as many steps, then adapt to the same chain with tokens renamed."""
    model, chain = copy.deepcopy(_pretrained(setting.seed, 2 * setting.steps))
    torch.manual_seed(setting.seed)
    adapters = insert_adapters(model)
    player = Player("adapters", AdamW(adapters, setting.lr), model, setting.method, setting.steps)
    for _ in range(setting.steps):
        text = chain.draw(_SEQUENCES, _SHIFT)
        player.move(lambda text=text: _loss(model, text))
    with torch.no_grad():
        loss = _loss(model, chain.draw(_JUDGED, _SHIFT)).item()
    return {"validation loss": loss}, [player]


class Chain:
    """A Markov chain over 64 tokens, each followed by one of four, which are drawn here."""

    def __init__(self) -> None:
        self.following = torch.randint(_TOKENS, (_TOKENS, _NEXT))

    def draw(self, count: int, shift: int = 0) -> Tensor:
        """Return sequences [count, 33], with so much added to each token."""
        tokens = [torch.randint(_TOKENS, (count,))]
        for _ in range(_CONTEXT):
            tokens.append(self.following[tokens[-1], torch.randint(_NEXT, (count,))])
        return (torch.stack(tokens, dim=1) + shift) % _TOKENS


def insert_adapters(model: CharacterTransformer) -> list[nn.Parameter]:
    """Freeze the model, adapt each linear layer of its blocks, and return what is trained."""
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Adapted(layer, _RANK, _SCALE))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@lru_cache(maxsize=1)
def _pretrained(seed: int, steps: int) -> tuple[CharacterTransformer, Chain]:
    torch.manual_seed(seed)
    chain = Chain()
    model = CharacterTransformer(_TOKENS, width=48, layers=2, heads=4, context=_CONTEXT)
    optimizer = AdamW(model.parameters(), _PRETRAINING_LR)
    scheduler = CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, chain.draw(_SEQUENCES)).backward()
        optimizer.step()
        scheduler.step()
    return model, chain


def _loss(model: nn.Module, text: Tensor) -> Tensor:
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
