"""The level, and the learning rates that follow from it. Knows factors and losses, no models."""

from .level import Level

__all__ = ["Level"]
