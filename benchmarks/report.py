"""Turns what pytest-benchmark measured into ``results/NAME.json`` and ``results/NAME.md``.

``python -m benchmarks.report BENCHMARK.json NAME``; ``make bench`` calls it.
"""

from __future__ import annotations

import json
import platform
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import autolr_fast

RESULTS = Path(__file__).parent / "results"


def main(source: Path, name: str) -> None:
    """Write both files.

    Args:
        source: JSON of pytest-benchmark, whose rows have the ``extra_info`` of ``test_ops.measure``.
        name: of the results.
    """
    measured = json.loads(source.read_text(encoding="utf-8"))
    rows = [
        {**row["extra_info"], "min_ms": 1e3 * row["stats"]["min"], "median_ms": 1e3 * row["stats"]["median"]}
        for row in measured["benchmarks"]
    ]
    cpu = measured["machine_info"]["cpu"]
    header = {
        "command": "make bench",
        "date": measured["datetime"][:10],
        "machine": f"{cpu['brand_raw']}, {cpu['count']} cores, {rows[0]['threads']} threads",
        "device": rows[0]["device"],
        "versions": f"autolr_fast {autolr_fast.__version__}, torch {rows[0]['torch']}, "
        f"Python {platform.python_version()}",
    }
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({**header, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(markdown(header, rows), encoding="utf-8")


def markdown(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return a table for each model; bandwidth is that of the bytes that must move, whatever a row moves."""
    lines = ["# Writing all candidates", "", *(f"- {name}: {value}" for name, value in header.items()), ""]
    lines += [
        "Bandwidth counts the bytes that must move: two inputs read and N outputs written once each. The share is",
        "that of a plain copy of as many bytes, made before each round of the same row: the memory's speed changes",
        "with what else the machine does. All by medians. A copy that fits the caches is faster than the memory.",
    ]
    for model, group in groupby(sorted(rows, key=lambda row: row["parameters"]), key=lambda row: row["model"]):
        cases = sorted(group, key=lambda row: row["median_ms"])
        best = next(row for row in cases if row["what"].startswith("ours"))
        lines += [
            "",
            f"## {model}: {best['parameters']:,} parameters in {best['tensors']} tensors, N = {best['candidates']}",
            "",
            "| | median | min | GB/s | the copy's | share | time / ours |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in cases:
            speed, copied = (row["bytes"] / row[time] / 1e6 for time in ("median_ms", "copy_ms"))
            lines.append(
                f"| {row['what']} | {row['median_ms']:.3f} ms | {row['min_ms']:.3f} ms | {speed:.1f} "
                f"| {copied:.1f} | {speed / copied:.0%} | {row['median_ms'] / best['median_ms']:.2f} |"
            )
    if header["device"] == "cpu":
        lines += [
            "",
            "## GPU",
            "",
            "Not measured: `make bench TORCH=torch` on a machine with a GPU fills this section.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
