"""Whether AutoLR ends as plain Adam does: ``python -m benchmarks.games`` writes ``results/games.md``.

It takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from cpuinfo import get_cpu_info

import autolr_fast

from .players import AUTO, COSINE, METHODS
from .report import GRID, STARTS, page, write
from .tasks import ADAPTERS, TASKS, Cell, run

__all__ = ["cells", "main"]

SEEDS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Train every cell, and write the results if all of them were.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.games", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed; the page is printed, and not written")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"some of {', '.join(TASKS)}; not written either"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    seeds = range(1 if args.quick else SEEDS)
    rows: list[dict[str, Any]] = []
    for cell in cells(args.tasks or list(TASKS), seeds):
        rows.append(run(cell))
        print(*cell, rows[-1]["figures"] or rows[-1]["error"], f"{rows[-1]['seconds']:.1f} s", flush=True)
    header = _header(seeds, time.perf_counter() - start)
    if args.quick or args.tasks:
        print(page(header, rows))
    else:
        write(header, rows)


def cells(tasks: Sequence[str], seeds: Sequence[int]) -> Iterator[Cell]:
    """Return each task's runs at its usual rate, then those of the adapters from other starts; seed by seed."""
    for name in tasks:
        for seed in seeds:
            yield from (Cell(name, method, TASKS[name].lr, seed) for method in METHODS)
            if name == ADAPTERS:
                others = {AUTO: STARTS, COSINE: GRID}
                for method, lrs in others.items():
                    yield from (Cell(name, method, lr, seed) for lr in lrs if lr != TASKS[name].lr)


def _header(seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    cpu = get_cpu_info()
    return {
        "command": "python -m benchmarks.games",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{cpu['brand_raw']}, {cpu['count']} cores, {torch.get_num_threads()} threads",
        "device": "cpu",
        "versions": f"autolr_fast {autolr_fast.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "seeds": f"{seeds[0]} to {seeds[-1]}",
        "time": f"{seconds / 60:.0f} minutes",
    }


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of this process alone: games that are over leave gradients next to nothing
    main()
