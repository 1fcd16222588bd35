"""The command line: ``demo`` has the learning rate found, ``plot`` draws a run, ``info`` says what serves here."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ._ops import info
from ._version import __version__
from .demo import schedules, tree
from .plotting import plot
from .probe import Probe

__all__ = ["main"]

_PICTURES = (".png", ".svg", ".pdf", ".jpg")
_DEMO = """
Train a small network on handwritten digits under six schedules, from each learning rate.
The demo prints a table, and writes the table and two pictures. It takes about a minute.
"""
_PLOT = """
Draw the learning rate and the level of a run over its steps, and the probes.
LOG holds a probe a line, as JSON. A training script writes it by

    with open("run.jsonl", "w") as file:
        for probe in scheduler.history:
            print(json.dumps(probe.to_dict()), file=file)
"""
_INFO = """
Print the versions, which backend serves each device, why the others do not, and what to do about it.
"""
_REMEDY = "write each probe of scheduler.history on a line of its own, by json.dumps(probe.to_dict())"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.

    Raises:
        SystemExit: with code 2 if something is for the user to mend.
    """
    parser = argparse.ArgumentParser(
        prog="python -m autolr_fast",
        description="A learning-rate scheduler that finds the rate while training runs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    demo = _add(commands, "demo", "compare AutoLR with other schedules on a small task", _DEMO)
    demo.set_defaults(run=_demo, extra="demo", packages=("matplotlib", "sklearn", "tqdm"))
    demo.add_argument("--tree", action="store_true", help="search with ALRTree, from all learning rates at once")
    what = "learning rates to start from (default: 0.0001 0.001 0.01 0.1 1)"
    starts = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    demo.add_argument("--lr", type=_positive(float), nargs="+", default=starts, metavar="LR", help=what)
    what = "the optimizer; sgd has momentum 0.9 (default: sgd)"
    demo.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd", help=what)
    what = "epochs of each training (default: 10)"
    demo.add_argument("--epochs", type=_positive(int), default=10, metavar="N", help=what)
    what = "seed of the weights, the split and the order (default: 0)"
    demo.add_argument("--seed", type=int, default=0, metavar="N", help=what)
    what = (
        "the picture; the table goes beside it, as .md; without --tree, a picture of one run of AutoLR does too, "
        "as _run.png (default: autolr_demo.png)"
    )
    demo.add_argument("--out", type=_picture, default=Path("autolr_demo.png"), metavar="FILE", help=what)

    draw = _add(commands, "plot", "draw a run that a training script has logged", _PLOT)
    draw.set_defaults(run=_plot, extra="plot", packages=("matplotlib",))
    draw.add_argument("log", type=Path, metavar="LOG", help="file of JSON lines")
    what = "the picture (default: the name of LOG, with .png)"
    draw.add_argument("--out", type=_picture, metavar="FILE", help=what)
    what = "index of the param group to draw (default: 0)"
    draw.add_argument("--group", type=int, default=0, metavar="N", help=what)

    say = _add(commands, "info", "print what serves each device, and why", _INFO)
    say.set_defaults(run=info.main, packages=())

    args = parser.parse_args(argv)
    if missing := [package for package in args.packages if find_spec(package) is None]:
        args.parser.error(f"{', '.join(missing)} cannot be imported: pip install 'autolr_fast[{args.extra}]'")
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        args.parser.error(str(error))


def _add(commands: argparse._SubParsersAction, name: str, what: str, description: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    """Return the parser of a command."""
    style = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=description, formatter_class=style
    )
    parser.set_defaults(parser=parser)
    return parser


def _demo(args: argparse.Namespace) -> None:
    _make_folder(args.out)  # before a minute of training
    (tree if args.tree else schedules).main(args)


def _plot(args: argparse.Namespace) -> None:
    out = args.out or args.log.with_suffix(".png")
    history = _read(args.log)
    figure = plot(history, group=args.group, title=f"What AutoLR did: {args.log.name}")
    _make_folder(out)
    figure.savefig(out, dpi=150)
    print(f"wrote {out}")


def _read(log: Path) -> list[Probe]:
    """Return the probes of a file of JSON lines.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a line is no probe; says which.
    """
    history = []
    for number, line in enumerate(log.read_bytes().splitlines(), start=1):
        try:
            if line.strip():
                history.append(Probe.from_dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            kind = "JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else "a probe"
            raise ValueError(f"line {number} of {log} is not {kind} ({error}): {_REMEDY}") from error
    if not history:
        raise ValueError(f"{log} is empty: {_REMEDY}")
    return history


def _make_folder(out: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        OSError: if it cannot be written to.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"{out.parent} cannot be written to: give another --out")


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the name of a picture: end it with {', '.join(_PICTURES)}"
        )
    return path


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
