"""A study of learning rates: ``python -m benchmarks.study [STUDY ...] --images DIR --text FILE --minutes 60``.

Trains what is missing, a line of ``results/study/runs.jsonl.xz`` each.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial

from .grid import STUDIES
from .slices import add_arguments, run_missing
from .training import train


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Train what is missing of the studies; what is there is not trained again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="studies:\n" + "\n".join(f"  {name:12} {study.title}" for name, study in STUDIES.items()),
    )
    parser.add_argument("studies", nargs="*", metavar="STUDY", type=_study, help="which (all)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    studies = [STUDIES[name] for name in args.studies or STUDIES]
    cells = itertools.chain.from_iterable(study.cells(range(args.seeds)) for study in studies)
    run_missing(partial(train, validated=["AutoLR"]), cells, args.results / "runs.jsonl.xz", args, parser)


def _study(name: str) -> str:
    if name not in STUDIES:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(STUDIES)}")
    return name


if __name__ == "__main__":
    main()
