"""Did a change move a decision? ``python -m benchmarks.study.again before.jsonl.xz --images DIR --text FILE``.

The first call trains some of the study's cells and writes their rows; after the change, the same call trains them
again on the same machine and compares, to the last digit.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import Places
from .slices import add_arguments, add_row, read
from .tasks import TASKS
from .training import Cell, train

__all__ = ["choose", "main"]

_MEASURED = ("seconds", "scheduling", "machine")  # of a row: what the same training does not repeat


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; ends with an error if a row is not the same.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.again", description=__doc__)
    parser.add_argument("rows", type=Path, help="the file that the first call writes and the second compares with")
    parser.add_argument("--cells", type=int, default=2, help="of each task (%(default)s)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    before = {_cell(row): row for row in read(args.rows)}
    stored = [row for row in read(args.results / "runs.jsonl.xz") if row["method"] in (args.methods or ["AutoLR"])]
    differ = 0
    for cell in choose(
        [_cell(row) for row in stored if row["length"] == 1 and row["task"] in args.tasks], args.cells
    ):
        row = train(cell, Places(args.images, args.cache, args.text))
        if cell not in before:
            add_row(args.rows, row)
            said = "is written"
        else:
            fields = [name for name in row if name not in _MEASURED and row[name] != before[cell][name]]
            said = "differs in " + ", ".join(fields) if fields else "is the same"
            differ += bool(fields)
        print(*cell[:5], said, sep=", ", flush=True)
    if differ:
        parser.exit(1, f"{differ} rows are not the same\n")


def choose(cells: Sequence[Cell], count: int) -> list[Cell]:
    """Return so many cells of each task, spread over those that there are."""
    chosen = []
    for task in TASKS:
        of_task = [cell for cell in cells if cell.task == task]
        chosen += [of_task[(2 * n + 1) * len(of_task) // (2 * count)] for n in range(min(count, len(of_task)))]
    return chosen


def _cell(row: Mapping[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in Cell._fields})


if __name__ == "__main__":
    main()
