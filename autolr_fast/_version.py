"""The version of the package that is installed: that of the last tag, and of the commits since."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("autolr_fast")
except PackageNotFoundError:  # a folder that Python was pointed at, without an installation
    __version__ = "0+unknown"
