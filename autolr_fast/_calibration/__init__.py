"""The first rate and the first steps. Knows looks at losses, and moves nothing itself."""

from .calibration import Calibration, start_ratio

__all__ = ["Calibration", "start_ratio"]
