"""Writes the results of an experiment: rows as JSON lines, a table, a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cpuinfo import get_cpu_info

from ..saving import save
from .data import suffix_of
from .experiments import EXPERIMENTS, SCALES, Setting
from .pictures import picture
from .summary import summarize
from .tables import command, page

__all__ = ["RESULTS", "Report"]

RESULTS = Path(__file__).parents[1] / "results" / "paper"


class Report:
    """The results of an experiment on a data set, at a scale: those in a directory already, and those added.

    Rows of other data are left out, and those no longer of the experiment, by their setting or its options.

    Args:
        name: of the experiment.
        scale: of its runs.
        directory: of ``NAME.SCALE.jsonl``, ``NAME.SCALE.png`` and ``NAME.md``; the data set is part of the name,
            unless it is CIFAR-10.
        data: digest of the data set.
    """

    def __init__(self, name: str, scale: str, directory: Path, data: str):
        self._name = name
        self._scale = scale
        self._data = data
        self._directory = directory
        self._rows = {(row["setting"], row["seed"]): row for row in self._read(scale)}

    def add(self, setting: Setting, seed: int, out: Path) -> None:
        """Add a finished run.

        Args:
            setting: of the experiment.
            seed: of the run.
            out: its directory.

        Raises:
            ValueError: if it was trained on other data.
        """
        summary = summarize(out / "log.jsonl")
        if summary["data"] != self._data:
            raise ValueError(f"{out} is of images {summary['data'][:12]}, and this report of {self._data[:12]}")
        self._rows[setting.label, seed] = {
            "setting": setting.label,
            "scale": self._scale,
            "seed": seed,
            "command": command(self._name, self._scale),
            "options": self._options(setting),
            "machine": _machine(summary["device"]),
            **summary,
        }

    def write(self) -> list[Path]:
        """Write what there is; nothing, if that is nothing.

        Returns:
            The files written.
        """
        if not self._rows:
            return []
        order = [setting.label for setting in EXPERIMENTS[self._name].settings]
        rows = sorted(self._rows.values(), key=lambda row: (order.index(row["setting"]), row["seed"]))
        self._directory.mkdir(parents=True, exist_ok=True)
        lines, image = (self._path(f".{self._scale}.{suffix}") for suffix in ("jsonl", "png"))
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        save(picture(self._name, self._scale, rows), image, dpi=110)
        text = self._path(".md")
        rows_of_scales = {scale: self._read(scale) for scale in SCALES}
        text.write_text(page(self._name, rows_of_scales, self._data), encoding="utf-8")
        return [lines, image, text]

    def _read(self, scale: str) -> list[dict[str, Any]]:
        path = self._path(f".{scale}.jsonl")
        if not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        options = {setting.label: self._options(setting, scale) for setting in EXPERIMENTS[self._name].settings}
        return [row for row in rows if row["options"] == options.get(row["setting"]) and row["data"] == self._data]

    def _options(self, setting: Setting, scale: str | None = None) -> dict[str, Any]:
        return {**SCALES[scale or self._scale], **setting.options}

    def _path(self, suffix: str) -> Path:
        return self._directory / f"{self._name}{suffix_of(self._data)}{suffix}"


def _machine(device: str) -> str:
    """Return the name of a GPU as it is, and that of the processor here for a CPU."""
    if torch.cuda.is_available() and device == torch.cuda.get_device_name():
        return device
    cpu = get_cpu_info()
    return f"{cpu['brand_raw']}, {cpu['count']} cores"
