"""The demonstrations: ``python -m autolr_fast demo``, and with ``--tree``."""

from .schedules import BASELINES, load_digits, network

__all__ = ["BASELINES", "load_digits", "network"]
