"""Pictures as small files: the repository keeps them all."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

__all__ = ["save"]

_COLOURS = 128  # of a picture of lines and bars: the eye sees no difference, and a file is a third as large


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG of few colours."""
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=dpi)
    few = Image.open(whole).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    few.save(path, "PNG", optimize=True)
