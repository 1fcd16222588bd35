"""The results as Markdown, one function a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from .baselines import REFERENCE

__all__ = ["EVERY", "TABLES", "host_time", "memory", "ops", "probe", "source_over", "training", "tree"]

Rows = Sequence[Mapping[str, Any]]
EVERY = (1, 10, 30)
"""Optimizer steps from probe to probe."""


def ops(header: Mapping[str, Any], rows: Rows) -> str:
    """Return a table for each model; bandwidth is that of the bytes that must move, whatever a row moves."""
    lines = _head("Writing all candidates", header)
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
    return _with_gpu(lines, header)


def probe(header: Mapping[str, Any], rows: Rows) -> str:
    """Return a table for each model; a refused row has a reason instead of times."""
    lines = _head("What a probe costs", header)
    lines += [
        "A probe is the losses of N candidates. Its time is in plain forwards of the model in train mode without",
        "gradients, N of which are timed before each round of the same row: the median of these ratios is shown.",
        "N forwards are the floor for what evaluates candidates one after another; batching may go below. The",
        f"{REFERENCE} is, N times, a deep copy, its forward and backward, the update and a forward; the deep",
        "copies leave out the backward. All have the same losses, which is checked. The line search (Armijo,",
        "c = 0.1) asks less: it writes the same factors in place from the largest, one forward each, and ends at",
        "the first that lowers the loss enough, after as many trials as shown.",
        "",
        "Every = k: what a probe every k optimizer steps adds to the time of these k training steps (forward,",
        "backward, SGD with momentum). The snapshot before the step (one copy of the parameters) and what is done",
        "only once in a training (checks, buffers, the choice of auto, calibration) are not counted.",
    ]
    for model, group in groupby(rows, key=lambda row: row["model"]):
        cases = list(group)
        step = next(row for row in cases if row["what"] == "training step")
        forwards = step["ratio"] * step["n"]
        lines += [
            "",
            f"## {model}: {step['parameters']:,} parameters in {step['tensors']} tensors",
            "",
            f"A training step takes {_time(step)}, as long as {forwards:.1f} forwards.",
            "",
            f"| N | | median | time / N forwards | {REFERENCE} / it | "
            + " | ".join(f"every = {every}" for every in EVERY)
            + " |",
            "|---" * (5 + len(EVERY)) + "|",
        ]
        cases = [row for row in cases if row is not step]
        for n, same in groupby(sorted(cases, key=lambda row: row["n"]), key=lambda row: row["n"]):
            of_n = sorted(same, key=lambda row: ("trials" in row, "reason" in row, row.get("ratio", 0)))
            for row in of_n:
                cells = [str(n), _name(row)]
                if "reason" in row:
                    cells += [_refusal(row), *("" for _ in range(2 + len(EVERY)))]
                else:
                    shares = (row["ratio"] * n / (every * forwards) for every in EVERY)
                    cells += [_time(row), f"{row['ratio']:.2f}"]
                    cells += [f"{source_over(row, of_n):.2f}", *(f"{share:.1%}" for share in shares)]
                lines.append(f"| {' | '.join(cells)} |")
    return _with_gpu(lines, header)


def source_over(row: Mapping[str, Any], of_same_n: Rows) -> float:
    """Return how many times as long the source's loop takes, each against its own forwards."""
    source = [other["ratio"] for other in of_same_n if other["what"] == REFERENCE]
    if not source:
        raise ValueError(f"the {REFERENCE} was not timed for as many candidates: measure the whole suite")
    return source[0] / row["ratio"]


def memory(header: Mapping[str, Any], rows: Rows) -> str:
    """Return a table for each model."""
    lines = _head("The memory of a probe", header)
    lines += [
        "In copies of the model's own parameters, on a CPU each row in a process of its own: the peaks of the",
        "first probe and of a later one over that of as many plain forwards before it, and what stays between",
        "probes. The snapshot of the parameters before the step is counted by itself: it is there from the opening",
        f"of a window to its probe. The {REFERENCE} is one candidate at a time; the gradients of each and what",
        "its backward saves are counted.",
        "",
        "The last rows are peaks of whole trainings of a few steps (SGD with momentum), over what model, gradients",
        "and optimizer hold between two steps. Where a training has its peak in its own backward, nothing of a",
        "probe but the snapshots should be there.",
    ]
    for model, group in groupby(rows, key=lambda row: row["model"]):
        cases = list(group)
        size = cases[0]["parameter_bytes"]
        lines += [
            "",
            f"## {model}: {size / 2**20:.0f} MiB of parameters, N = {cases[0]['n']}",
            "",
            "| | first probe | later probes | kept |",
            "|---|---|---|---|",
        ]
        for row in cases:
            if "reason" in row:
                lines.append(f"| {_name(row)} | {_refusal(row)} | | |")
            elif "kept" in row:
                sizes = (f"{row[size]:.2f}" if size in row else "" for size in ("first", "later", "kept"))
                lines.append(f"| {_name(row)} | {' | '.join(sizes)} |")
        lines += ["", "| | peak | over plain training |", "|---|---|---|"]
        trainings = [row for row in cases if "peak" in row]
        for row in trainings:
            lines.append(f"| {row['what']} | {row['peak']:.2f} | {row['peak'] - trainings[0]['peak']:+.2f} |")
    return _with_gpu(lines, header)


def tree(header: Mapping[str, Any], rows: Rows) -> str:
    """Return a table for each model."""
    lines = _head("What a search over learning rates costs", header)
    lines += [
        "ALRTree with M beams and N factors trains M x N branches. The time is that of one batch for all of them,",
        "SGD with momentum. Before each round as many training steps of one model with torch.optim.SGD are timed,",
        "which is what training the branches one after another takes; the median of the ratios is shown.",
        "",
        "Memory is the peak of two epochs of one batch with plain SGD, in copies of the parameters, over what",
        "there was before; on a CPU each has a process of its own. Parameters and gradients of all branches are",
        "2 M N; to a batched pass come the activations of as many forwards. The last column is the peak of the",
        "reference, which has one candidate and the survivors.",
    ]
    for model, group in groupby(rows, key=lambda row: row["model"]):
        cases = list(group)
        lines += [
            "",
            f"## {model}: {cases[0]['parameters']:,} parameters in {cases[0]['tensors']} tensors",
            "",
            f"Activations of one model: {cases[0]['activations']:.2f} copies of the parameters.",
            "",
            "| M, N | | median | one after another / it | memory | 2 M N | with activations | reference |",
            "|---" * 8 + "|",
        ]
        for row in sorted(cases, key=lambda row: (row["beams"] * row["n"], row["ratio"])):
            branches = row["beams"] * row["n"]
            models_at_once = branches if row["ran"] == "batched" else 1
            cells = [f"{row['beams']}, {row['n']}", _name(row), _time(row), f"{1 / row['ratio']:.2f}"]
            cells += [f"{row['peak']:.1f}", f"{2 * branches}"]
            cells += [f"{2 * branches + models_at_once * row['activations']:.1f}", f"{row['reference_peak']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return _with_gpu(lines, header)


def _time(row: Mapping[str, Any]) -> str:
    """Return the median with three digits or more."""
    milliseconds = row["median_ms"]
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _name(row: Mapping[str, Any]) -> str:
    if row.get("ran", row["what"]) != row["what"]:
        return f"{row['what']} ({row['ran']})"
    trials = row.get("trials", 0)
    return f"{row['what']} ({trials} trial{'s' * (trials > 1)})" if trials else str(row["what"])


def _refusal(row: Mapping[str, Any]) -> str:
    """Return the first line of the reason: torch's have several."""
    return f"refused: {row['reason'].splitlines()[0]}".replace("|", r"\|")


def _head(title: str, header: Mapping[str, Any]) -> list[str]:
    return [f"# {title}", "", *(f"- {name}: {value}" for name, value in header.items()), ""]


def _with_gpu(lines: list[str], header: Mapping[str, Any]) -> str:
    if header["device"] == "cpu":
        lines += [
            "",
            "## GPU",
            "",
            "`make bench TORCH=torch` on a machine with a GPU writes the same pages to [gpu/](gpu).",
        ]
    return "\n".join(lines) + "\n"


def training(header: Mapping[str, Any], rows: Rows) -> str:
    """Return one table, a row for each model and optimizer."""
    lines = _head("What AutoLR adds to a training", header)
    lines += [
        "Milliseconds a step of a whole training with the defaults, with all that is done once in it, and of the",
        "same with a cosine schedule, which is timed before and after it. The last column is what scheduler.loss",
        "adds between probes to the call of a closure that has its loss already.",
        "",
        "| model | optimizer | steps | cosine | AutoLR | it adds | evaluator | scheduler.loss adds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['optimizer']} | {row['steps']} | {row['cosine_ms']:.3g} ms | {row['ms']:.3g} ms "
        f"| {row['ms'] / row['cosine_ms'] - 1:.0%} | {row['evaluator']} | {_overhead(row)} |"
        for row in rows
    ]
    return _with_gpu(lines, header)


def _overhead(row: Mapping[str, Any]) -> str:
    return f"{row['loss_us'] - row['closure_us']:.2f} us" if "loss_us" in row else "not measured"


def host_time(header: Mapping[str, Any], rows: Rows) -> str:
    """Return one table, a row for each model and backend."""
    lines = _head("What the host does at each write", header)
    lines += [
        "Microseconds of host time for all candidates of a model, by tensors of one element. Launches do nothing:",
        "for cuda and triton a driver's part and the current stream's are left out, cpp writes the few elements.",
        "The operator boxes and checks all tensors at each call. A plan is made once a probe, a write is a further",
        "call; in it, the address of each row is compared. The shortest of many rounds, in turns.",
        "",
        "| model | tensors | N | backend | operator | plan | write | addresses in it | operator / write |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        times = " | ".join(f"{row[name]:.1f}" for name in ("operator_us", "plan_us", "write_us", "compare_us"))
        lines.append(
            f"| {row['model']} | {row['tensors']} | {row['candidates']} | {row['backend']} | {times} "
            f"| {row['operator_us'] / row['write_us']:.1f} |"
        )
    return "\n".join(lines) + "\n"


TABLES: Mapping[str, Callable[[Mapping[str, Any], Rows], str]] = {
    "ops": ops,
    "probe": probe,
    "memory": memory,
    "training": training,
    "tree": tree,
    "host_time": host_time,
}
