"""Trains what is missing, for as long as there is time: one row of a file for each cell."""

from __future__ import annotations

import argparse
import json
import lzma
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..paper.data import DataError
from ..paper.train import CACHE, number
from .data import Places
from .methods import METHODS
from .tasks import TASKS
from .training import Cell

__all__ = ["RESULTS", "add_arguments", "add_row", "read", "run_missing"]

RESULTS = Path(__file__).parents[1] / "results" / "study"
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every study is told: where data and results lie, what to leave out, how long to go on."""
    add = parser.add_argument
    add(
        "--images",
        type=Path,
        help=f"directory with train-*.parquet and test-*.parquet, for {_reading('images')}",
    )
    add("--text", type=Path, help=f"a text to learn, for {_reading('text')}")
    add("--seeds", type=number(int, lowest=1), default=3, help="how many (%(default)s)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only these")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="only these, named as in the table")
    add("--forget", action="store_true", help="remove the rows of these runs, to train them again, and end")
    add("--jobs", type=number(int, lowest=1), default=os.cpu_count(), help="runs at a time (one a core)")
    add("--minutes", type=number(float, lowest=0), default=math.inf, help="begin no more then (no limit)")
    add("--results", type=Path, default=RESULTS, help="directory of the results (%(default)s)")
    add(
        "--cache",
        type=Path,
        default=CACHE,
        help="of decoded images and pretrained networks (%(default)s)",
    )


def _reading(place: str) -> str:
    return ", ".join(name for name, task in TASKS.items() if task.place == place)


def read(path: Path) -> list[Row]:
    """Return the rows of a compressed file of JSON lines; none of no such file, nor of a stream that was cut."""
    left, rows = path.read_bytes() if path.exists() else b"", []
    while left:
        stream = lzma.LZMADecompressor()
        text = stream.decompress(left)
        if not stream.eof:  # killed while it wrote
            break
        rows += map(json.loads, text.splitlines())
        left = stream.unused_data
    return rows


def add_row(path: Path, row: Row) -> None:
    """Add a row to such a file, as a stream of its own: what is there is not written again."""
    with path.open("ab") as file:
        file.write(_compressed([row]))


def _write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of these rows, which as one stream takes a tenth of the space."""
    whole = path.with_name(path.name + ".new")
    whole.write_bytes(_compressed(rows))
    whole.replace(path)


def _compressed(rows: Iterable[Row]) -> bytes:
    return lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def run_missing(
    work: Callable[[Cell, Places], Row],
    cells: Iterable[Cell],
    path: Path,
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
) -> None:
    """Do the work for each cell that has no row in a file yet, and add its row there; say what is still missing.

    Args:
        work: what is done; it runs in another process.
        cells: in the order in which they are wanted.
        path: of the compressed file of JSON lines.
        args: what :func:`add_arguments` lists.
        parser: is told of data that are not there, and of packages.
    """
    wanted = [
        cell
        for cell in dict.fromkeys(cells)
        if cell.task in args.tasks and (not args.methods or cell.method in args.methods)
    ]
    rows = read(path)
    if args.forget:
        left = [row for row in rows if _cell(row) not in set(wanted)]
        _write(path, left)
        print(f"{len(rows) - len(left)} runs are forgotten, {len(left)} are left")
        return
    done = set(map(_cell, rows))
    missing = [cell for cell in wanted if cell not in done]
    read_by: dict[str, list[str]] = {}
    for task in dict.fromkeys(cell.task for cell in missing):
        if (place := TASKS[task].place) and getattr(args, place) is None:
            read_by.setdefault(place, []).append(task)
    if read_by:
        needed = "; ".join(f"--{place} is needed for {', '.join(tasks)}" for place, tasks in read_by.items())
        parser.error(f"{needed}: give it, or leave the tasks out by --tasks")
    count = len(missing)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if missing:
            _write(path, rows)  # without what a killed run left there
        for row in _run(work, missing, Places(args.images, args.cache, args.text), args.jobs, args.minutes):
            add_row(path, row)
            rows.append(row)
            count -= 1
        if count < len(missing):
            _write(path, rows)
    except (DataError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: pip install '.[study]', or leave out what needs it by --methods or --tasks")
    more = "; call this again, with --minutes for them, to go on" if count else ""
    print(f"{count} of {len(wanted)} runs are missing{more}")


def _cell(row: Row) -> Cell:
    return Cell(**{name: row[name] for name in Cell._fields})


def _run(
    work: Callable[[Cell, Places], Row], cells: Sequence[Cell], places: Places, jobs: int, minutes: float
) -> Iterator[Row]:
    end = time.monotonic() + 60 * minutes
    waiting = iter(cells)
    running: set[Future[Row]] = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool, tqdm(total=len(cells), unit="run", mininterval=1) as progress:
        while True:
            while len(running) < jobs and time.monotonic() < end and (cell := next(waiting, None)):
                running.add(pool.submit(work, cell, places))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
                progress.update()
