"""The script for a GPU, with stand-ins for make and Python that write down how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "on_gpu.sh"


@pytest.fixture
def call(tmp_path):
    """Run a copy of the script in a repository of its own; return its status and what it called since."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "data").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    calls = tmp_path / "calls"
    for name in ("bin/make", "bin/git", "venv/bin/python"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fails = 'case "$*" in *"$FAILS"*) exit 3;; esac'
        says = "echo abc1234" if name == "bin/git" else f'echo "{path.name} $*" >> {calls}; {fails}'
        path.write_text(f"#!/bin/sh\n{says}\n")
        path.chmod(0o755)

    def run(*arguments, fails="nothing"):
        calls.write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "VENV": str(tmp_path / "venv"), "FAILS": fails}
        script = [tmp_path / "benchmarks" / "on_gpu.sh", *arguments]
        status = subprocess.run(script, env=environment, cwd=tmp_path, check=False).returncode
        made, *others = calls.read_text().splitlines() or [""]
        assert made in ("", f"make {tmp_path}/venv/dev.installed")
        return status, others

    return run


def test_what_has_passed_is_not_repeated_and_the_table_goes_on(call, tmp_path):
    table = f"python -m benchmarks.paper schedulers --scale full --data {tmp_path}/data --minutes"
    tests = ["python -m pytest --device cuda tests", "python -m pytest benchmarks/tests/test_paper_passes.py"]
    assert call("10", "data", fails="pytest --device") == (3, tests[:1])  # nothing is measured of what is wrong
    status, called = call("10", "data")
    assert (status, called[:-1]) == (0, [*tests, "make bench"])
    assert called[-1] in (f"{table} 9", f"{table} 10")
    status, called = call("10", "data")
    assert (status, len(called)) == (0, 1)
    assert called[0].startswith(table)
    assert call("10", "data", "bench", "tests") == (0, [])


def test_no_part_begins_without_time(call):
    assert call("0", "data") == (124, [])
    assert call("0", "data", "table") == (124, [])


def test_bad_arguments_are_named(call, capfd):
    assert call()[0] != 0
    assert call("10", "data", "tabel")[0] == 2
    assert capfd.readouterr().err.count("usage: benchmarks/on_gpu.sh MINUTES DIR") == 2
