"""Networks that were trained before: on other classes of images, and on a text in another spelling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor

from ..models import CharacterTransformer
from ..paper.models import ResNet18
from .data import Data, Places, alphabet, divided, halved, pieces, read_images, read_text
from .language import text_transformer
from .pretraining import Pretraining, pretrained

__all__ = ["finetuned_classifier", "finetuned_transformer", "later_text", "other_classes", "plain"]

_CLASSES = 5  # of the pretraining, the first of CIFAR-10; as many are left
_OF_IMAGES = Pretraining(steps=1000, batch_size=128, lr=0.01)
_OF_TEXT = Pretraining(steps=1500, batch_size=32, lr=0.003)


def finetuned_classifier(places: Places) -> ResNet18:
    """Return a network as the first five classes of CIFAR-10 left it, with a new head for as many."""
    model = _classifier()
    head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    model.load_state_dict({**_classifier_state(places), **head})
    return model


def other_classes(places: Places) -> Data:
    """Return 1,000 images of the other five classes to train on, 16 x 16, and all that there are to test with."""
    (x, y), test = _classes(places, _CLASSES)
    return Data((x[:1000], y[:1000]), test)


def finetuned_transformer(places: Places) -> CharacterTransformer:
    """Return a transformer that has read the first half of the text, without its capitals and names of speakers."""
    model = text_transformer()
    model.load_state_dict(_transformer_state(places))
    return model


def later_text(places: Places) -> Data:
    """Return the second half of the text, as it is written, in pieces of 64 characters."""
    written = read_text(places)
    return divided(pieces(written, alphabet(written)), first=0.5)


def plain(written: str) -> str:
    """Return a play in lower case, without the lines that say who speaks."""
    return re.sub(r"(\A|(?<=\n\n))[^\n:]+:\n", "", written).lower()


def _classifier() -> ResNet18:
    return ResNet18(_CLASSES, 8)


@cache
def _classifier_state(places: Places) -> Mapping[str, Tensor]:
    return pretrained(_classifier, _classes(places, 0), _OF_IMAGES, places)


def _classes(places: Places, first: int) -> Data:
    """Return the images of five classes of CIFAR-10, 16 x 16, standardised by those to train on."""
    images, labels, test_images, test_labels, _ = read_images(places)
    chosen, test = (((of >= first) & (of < first + _CLASSES)).nonzero().flatten() for of in (labels, test_labels))
    x, test_x = halved(images[chosen], test_images[test])
    return Data((x, labels[chosen] - first), (test_x, test_labels[test] - first))


@cache
def _transformer_state(places: Places) -> Mapping[str, Tensor]:
    written = read_text(places)
    cut = pieces(plain(written[: len(written) // 2]), alphabet(written))
    return pretrained(text_transformer, divided(cut), _OF_TEXT, places)
