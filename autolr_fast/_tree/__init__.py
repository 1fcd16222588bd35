"""The ALR technique: a beam search over learning rates, whose branches are one stacked model."""

from .alr_tree import ALRTree
from .epoch import Branch, Epoch

__all__ = ["ALRTree", "Branch", "Epoch"]
