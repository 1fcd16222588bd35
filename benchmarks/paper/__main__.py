"""The experiments of the source: ``python -m benchmarks.paper [EXPERIMENT ...] --data DIR``.

Runs what is missing of each, and writes its results to ``benchmarks/results/paper/``. Runs and results of another
data set than CIFAR-10 have its name beside the experiment's.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .data import DataError, load_dataset, suffix_of
from .experiments import EXPERIMENTS, SCALES, Setting, arguments
from .passes import STEPS
from .report import RESULTS, Report
from .runner import Planned, is_finished, run_missing
from .train import CACHE, device, number

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; bad arguments and runs that fail end it with a message and status 2.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if args.scale == "full" and args.device is None and not gpu:
        parser.error(
            "--scale full: there is no GPU here; use --scale small, or --device cpu if weeks do not matter"
        )
    where = args.device or ("cuda" if gpu else "cpu")
    jobs = args.jobs if args.jobs is not None else (1 if where.startswith("cuda") else os.cpu_count() or 1)
    names = args.experiments or list(EXPERIMENTS)
    try:
        data = load_dataset(args.data, args.cache).digest  # decodes once what all runs read
    except (DataError, OSError) as error:
        parser.error(str(error))

    step = args.step or ("captured" if args.scale == "full" and where.startswith("cuda") else "eager")
    places = ("--data", str(args.data.resolve()), "--cache", str(args.cache.resolve()))
    places = (*places, "--device", where, "--step", step)
    directory = args.runs.resolve() / f"{args.scale}{suffix_of(data)}"

    def planned(setting: Setting, seed: int) -> Planned:
        """The same setting has one place in all experiments, and is run once."""
        chosen = dict(sorted(setting.options.items()))
        out = directory / "_".join(f"{key}-{value}" for key, value in chosen.items())
        options = arguments({**SCALES[args.scale], **chosen, "seed": seed})
        return Planned(out / f"seed-{seed}", tuple(options), places)

    seeds = range(args.seeds)
    runs = {name: [[planned(s, seed) for s in EXPERIMENTS[name].settings] for seed in seeds] for name in names}
    # All settings with one seed come before those with the next: there is something to compare whenever it stops.
    wanted = dict.fromkeys(run for seed in seeds for name in names for run in runs[name][seed])
    try:
        failed = run_missing(list(wanted), jobs, args.minutes)
    except KeyboardInterrupt:
        failed = []
        print("interrupted", file=sys.stderr)
    for name in names:
        report = Report(name, args.scale, args.results, data)
        for seed in seeds:
            for setting, run in zip(EXPERIMENTS[name].settings, runs[name][seed], strict=True):
                if is_finished(run):
                    report.add(setting, seed, run.out)
        for path in report.write():
            print(f"wrote {path}")
    if failed:
        what = "\n".join(f"  {out}/stderr.txt" for out in failed)
        parser.exit(2, f"{len(failed)} of {len(wanted)} runs failed; what they said:\n{what}\n")
    if missing := sum(not is_finished(run) for run in wanted):
        print(f"{missing} of {len(wanted)} runs are missing; call this again, with --minutes for them, to go on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description="Run the source's experiments; what is finished already is not run again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="experiments:\n" + "\n".join(f"  {name:12} {it.title}" for name, it in EXPERIMENTS.items()),
    )
    add = parser.add_argument
    add("experiments", nargs="*", metavar="EXPERIMENT", help="which (all)", type=_experiment)
    add("--data", type=Path, required=True, help="directory with train-*.parquet and test-*.parquet")
    add("--scale", choices=SCALES, default="small", help="full is the source's setting, for a GPU (%(default)s)")
    add("--seeds", type=number(int, lowest=1), default=3, help="how many (%(default)s)")
    add(
        "--jobs",
        type=number(int, lowest=0),
        help="runs at a time; 0 runs them in this process (one a core; on a GPU 1)",
    )
    add(
        "--minutes",
        type=number(float, lowest=0),
        default=math.inf,
        help="stop then; 0 only writes what is there (no limit)",
    )
    add("--device", type=device, help="where to train (a GPU if there is one)")
    add("--step", choices=STEPS, help="how forward and backward run (captured on a GPU at full scale, else eager)")
    add("--runs", type=Path, default=Path("build/paper"), help="directory of logs and checkpoints (%(default)s)")
    add("--results", type=Path, default=RESULTS, help="directory of the results (%(default)s)")
    add("--cache", type=Path, default=CACHE, help="directory of the decoded images (%(default)s)")
    return parser


def _experiment(name: str) -> str:
    if name not in EXPERIMENTS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(EXPERIMENTS)}")
    return name


if __name__ == "__main__":
    main()
