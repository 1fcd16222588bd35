"""Fills the tables of the docs, and draws their pictures: ``python -m benchmarks.pages``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .markdown import ROOT, fill
from .tables import TABLES

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages",
        description="Fill the tables of README and docs/ from the results, and draw their pictures; one minute.",
    )
    parser.add_argument("--tables", action="store_true", help="fill the tables alone")
    args = parser.parse_args(argv)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text, TABLES)) != text:
            path.write_text(filled, encoding="utf-8")
            print(f"filled {path.relative_to(ROOT)}")
    if args.tables:
        return
    # These need matplotlib, and scikit-learn for a run.
    from ..saving import save  # noqa: PLC0415
    from .pictures import PICTURES  # noqa: PLC0415

    for name, draw in PICTURES.items():
        path = ROOT / "docs/pictures" / name
        save(draw(), path, dpi=150)
        print(f"drew {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
