"""Runs what is missing, several trainings side by side, each in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from . import train

__all__ = ["Planned", "is_finished", "run_missing"]


class Planned(NamedTuple):
    """A training.

    Attributes:
        out: where its log lies.
        options: of ``benchmarks.paper.train``, those that say what is computed.
        places: options that say where.
    """

    out: Path
    options: tuple[str, ...]
    places: tuple[str, ...]


def is_finished(run: Planned) -> bool:
    """Return whether the training has come to its end, and was of these options."""
    log = run.out / "log.jsonl"
    if not log.exists():
        return False
    lines = log.read_text(encoding="utf-8").splitlines()
    try:
        header, last = json.loads(lines[0]), json.loads(lines[-1])
    except (IndexError, ValueError):  # killed while it wrote
        return False
    given = shlex.split(header["command"])[len(train.COMMAND) :][: len(run.options)]
    return sorted(given) == sorted(run.options) and last["kind"] == "test" and last["step"] == header["total_steps"]


def run_missing(planned: Sequence[Planned], jobs: int, minutes: float) -> list[Path]:
    """Run the trainings that are not finished; those that were begun go on from their checkpoints.

    Args:
        planned: in the order they are to be run.
        jobs: how many at a time, each in a process with its share of the cores; 0 runs them in this one.
        minutes: until no more are begun, and the running ones are stopped.

    Returns:
        Those that failed; what they said is in ``stderr.txt`` beside the log.
    """
    waiting = [run for run in planned if not is_finished(run)]
    progress = tqdm(total=len(waiting), unit="run", desc="training", mininterval=1)
    end = time.monotonic() + 60 * minutes
    if jobs == 0:
        for run in waiting:
            if time.monotonic() >= end:
                break
            train.main(_arguments(run))
            progress.update()
        progress.close()
        return []
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    running: dict[Path, subprocess.Popen[bytes]] = {}
    failed = []
    try:
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < jobs and time.monotonic() < end:
                run = waiting.pop(0)
                running[run.out] = _start(run, environment)
            time.sleep(0.1)
            if time.monotonic() >= end:
                break
            for out in [out for out, process in running.items() if process.poll() is not None]:
                if running.pop(out).returncode != 0:
                    failed.append(out)
                progress.update()
    finally:
        for process in running.values():
            process.terminate()  # its checkpoint is at most --checkpoint-every steps old
        for process in running.values():
            process.wait()
        progress.close()
    return failed


def _arguments(run: Planned) -> list[str]:
    return [*run.options, *run.places, "--out", str(run.out)]


def _start(run: Planned, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    run.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *train.COMMAND[1:], *_arguments(run)]
    root = Path(__file__).parents[2]
    with (run.out / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=errors, stderr=errors)
