"""``python -m autolr_fast demo``: watch the learning rate being found; ``info``: what serves here, and why."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ._ops import info
from ._version import __version__
from .demo import schedules, tree

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m autolr_fast")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    what = "train a small network on digits under every schedule, print a table, write two pictures"
    demo_parser = commands.add_parser(
        "demo", help=what, description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    demo_parser.set_defaults(run=lambda args: (tree if args.tree else schedules).main(args))
    starts = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    what = "instead of the schedules, search from all starts at once with ALRTree"
    demo_parser.add_argument("--tree", action="store_true", help=what)
    demo_parser.add_argument("--lr", type=_positive(float), nargs="+", default=starts, help="where to start")
    demo_parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help="sgd has momentum 0.9")
    demo_parser.add_argument("--epochs", type=_positive(int), default=10, help="length of each training")
    demo_parser.add_argument("--seed", type=int, default=0, help="of weights, split and order")
    what = "the picture; beside it go the table, as .md, and without --tree AutoLR's own run, as _run.png"
    demo_parser.add_argument("--out", type=Path, default=Path("autolr_demo.png"), help=what)

    what = "print which backend serves each device, why the others do not, and what to do about it"
    commands.add_parser("info", help=what, description=what).set_defaults(run=info.main)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ImportError as error:
        parser.error(f"the demo needs {error.name}: pip install 'autolr_fast[demo]'")
    except OSError as error:
        parser.error(str(error))


def _positive(kind: type[int] | type[float]):  # type: ignore[no-untyped-def]
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used; give a positive {kind.__name__}")
        return value

    return parse


if __name__ == "__main__":
    main()
