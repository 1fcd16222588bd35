"""What serves here, and why: ``python -m autolr_fast info``."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch

from .. import _ops as ops
from .._version import __version__

__all__ = ["main", "table"]


def main(args: argparse.Namespace) -> None:
    """Print the versions and the table."""
    versions = {"autolr_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    versions["triton"] = _version("triton")
    versions["CUDA of torch"] = torch.version.cuda or "none"
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if asked := os.environ.get(ops.VARIABLE):
        print(f"{ops.VARIABLE}={asked} asks for one backend; without it:")
    print(f"\n{table()}")


def table() -> str:
    """Return a Markdown table of devices and backends: which serves, and why the others do not."""
    rows = ["| device | backend | |", "|---|---|---|"]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        served = False
        for backend, reason in ops.explain(device):
            standing = reason or ("can serve too" if served else "**serves**")
            served = served or not reason
            rows.append(f"| {device} | {backend} | {standing} |")
    if "cuda" not in devices:
        rows.append("| cuda | | there is no GPU that this torch can use |")
    return "\n".join(rows)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
