"""Turns what was measured into ``results/NAME.json``, ``results/NAME.md`` and, for some, ``results/NAME.png``.

``python -m benchmarks.report BENCHMARK.json NAME`` for what pytest-benchmark measured; ``make bench`` calls it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpuinfo import get_cpu_info

import autolr_fast

from .pictures import PICTURES
from .saving import save
from .tables import TABLES

__all__ = ["RESULTS", "main", "write", "write_now"]

RESULTS = Path(__file__).parent / "results"
"""What was measured on a CPU; ``gpu/`` in it has the same of a GPU."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the results of a suite.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Write the tables of what pytest-benchmark measured."
    )
    parser.add_argument("benchmark", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("name", choices=("ops", "probe", "tree"), help="of the suite")
    args = parser.parse_args(argv)
    measured = json.loads(args.benchmark.read_text(encoding="utf-8"))
    rows = [_row(row["extra_info"], row["stats"]) for row in measured["benchmarks"]]
    write(args.name, measured["machine_info"], measured["datetime"][:10], rows, measured.get("refused", ()))


def write(
    name: str,
    machine: Mapping[str, Any],
    date: str,
    rows: Sequence[dict[str, Any]],
    refused: Sequence[dict[str, Any]] = (),
) -> None:
    """Write rows as JSON, as tables and as a picture.

    Args:
        name: in :data:`~benchmarks.tables.TABLES`.
        machine: ``cpu``, as py-cpuinfo describes it, and ``python_version``.
        date: of the measurement.
        rows: what was measured; the first says with which device, torch and threads.
        refused: rows that have a ``reason`` instead.
    """
    cpu = machine["cpu"]
    header = {
        "command": "make bench",
        "date": date,
        "machine": f"{cpu['brand_raw']}, {cpu['count']} cores, {rows[0]['threads']} threads",
        "device": rows[0]["device"],
        "versions": f"autolr_fast {autolr_fast.__version__}, torch {rows[0]['torch']}, "
        f"Python {machine['python_version']}",
        **{key: rows[0][key] for key in ("seed", "text", "memory") if key in rows[0]},
    }
    every = _by_model([*rows, *refused])
    folder = RESULTS if header["device"] == "cpu" else RESULTS / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**header, "rows": every}, indent=1)
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(TABLES[name](header, every), encoding="utf-8")
    if name in PICTURES:
        save(PICTURES[name](header, every), folder / f"{name}.png", dpi=150)


def write_now(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows that this process measured, today; see :func:`write`."""
    machine = {"cpu": get_cpu_info(), "python_version": platform.python_version()}
    write(name, machine, datetime.datetime.now(datetime.timezone.utc).date().isoformat(), rows)


def _row(info: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its times; with their ratio to those of the floor, where one was timed each round."""
    row = {**info, "min_ms": 1e3 * stats["min"], "median_ms": 1e3 * stats["median"]}
    if floors := row.pop("floors_ms", None):
        row["floor_ms"] = statistics.median(floors)
        pairs = zip(stats["data"], floors, strict=True)
        row["ratio"] = statistics.median(1e3 * seconds / floor for seconds, floor in pairs)
    return row


def _by_model(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of each model together, models as they come."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    return sorted(rows, key=lambda row: models.index(row["model"]))


if __name__ == "__main__":
    main()
