"""The version: that of the last tag, and of the commits since, when the package was last installed or built."""

from __future__ import annotations

from pathlib import Path

__all__ = ["__version__"]

_FILE = Path(__file__).with_name("version.txt")  # setuptools-scm writes it
__version__ = _FILE.read_text(encoding="utf-8").strip() if _FILE.exists() else "0+unknown"
