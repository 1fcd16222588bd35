"""The ALR technique: a beam search over learning rates, whose branches are one stacked model."""

from .records import Branch, Epoch
from .search import ALRTree

__all__ = ["ALRTree", "Branch", "Epoch"]
