"""The tables of measured figures in ``docs/``, each made from the results that it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import groupby

from .markdown import ROOT, TOGETHER, Table, lines, read

__all__ = ["TABLES", "TASKS"]

_RESULTS = "benchmarks/results"
_OVER_SOURCE = "source's loop / it"
_OPTIMIZERS = {"SGD": "SGD", "momentum": "SGD, momentum 0.9", "AdamW": "AdamW"}
TASKS: Mapping[str, str] = {
    "digits": "digits, convolutional network",
    "noise": "digits, 20 % of labels random",
    "friedman": "Friedman regression",
    "images": "CIFAR-10, ResNet",
    "transformer": "text, transformer",
    "lstm": "text, LSTM",
    "gru": "text, GRU",
    "vit": "CIFAR-10, vision transformer",
    "diffusion": "CIFAR-10, diffusion",
    "masked": "CIFAR-10, masked autoencoder",
    "vae": "digits, variational autoencoder",
    "finetuned-images": "fine-tuned ResNet, other classes",
    "finetuned-text": "fine-tuned transformer, other text",
    "speakers": "sentence encoder",
    "speakers-adapters": "sentence encoder, adapters",
}
"""What the tasks of the study are called in the docs."""
_IN_SHORT = {
    "text from scratch, % of the loss": ("transformer", "lstm", "gru"),
    "images from scratch, points": ("digits", "images", "vit"),
    "diffusion, masking, VAE, % of the loss": ("diffusion", "masked", "vae"),
    "a small regression, % of the loss": ("friedman",),
    "fine-tuning, points or %": ("finetuned-images", "finetuned-text"),
    "adapters, 80 steps, points": ("speakers-adapters",),
    "a fifth of the labels wrong, points": ("noise",),
}
_GAMES = {
    "GAN": "GAN",
    "WGAN": "WGAN with gradient penalty",
    "bandit": "REINFORCE on a bandit",
    "REINFORCE": "REINFORCE on CartPole",
    "PPO": "PPO on CartPole",
    "adapters": "adapters, far from their data (lower is better)",
}


def _demo() -> str:
    (table,) = read("docs/pictures/demo.md")
    return lines(["start", *table.heads[1:]], table.rows)


def _demo_accuracy() -> str:
    (table,) = read("docs/pictures/demo.md")
    starts = list(dict.fromkeys(row[0] for row in table.rows))
    rows = []
    for schedule in dict.fromkeys(row[1] for row in table.rows):
        accuracies = [row[2] for row in table.rows if row[1] == schedule]
        mark = "**" if schedule == "AutoLR" else ""
        rows.append([f"{mark}{_code(schedule)}{mark}", *(f"{mark}{each}{mark}" for each in accuracies)])
    return lines(["schedule", *starts], rows)


def _demo_overhead() -> str:
    (table,) = read("docs/pictures/demo.md")
    rows = [row for row in table.rows if row[1] == "AutoLR"]
    starts, overheads = [row[0] for row in rows], [row[-1] for row in rows]
    return lines(["start", *starts], [["time added", *overheads]])


def _tree_demo() -> str:
    (table,) = read("docs/pictures/tree.md")
    best = re.search(r"Test accuracy of the best model (\S+%)", (ROOT / "docs/pictures/tree.md").read_text("utf-8"))
    assert best
    return lines(table.heads, [*table.rows, ["test", "", "", "", best[1]]])


def _rows_of_study() -> Mapping[tuple[str, str], Mapping[str, str]]:
    """Return the rows of the study's main tables, by task and optimizer."""
    found: dict[tuple[str, str], Mapping[str, str]] = {}
    for table in read(f"{_RESULTS}/study/study.md"):
        if table.section in ("From scratch", "Noise in the loss", "Fine-tuning"):
            for row in table.rows:
                task, optimizer = row[0].split(", ")
                found[task, optimizer] = dict(zip(table.heads, row, strict=True))
    return found


def _study(cell: Callable[[Mapping[str, str]], str]) -> str:
    """Return a line a task and a column an optimizer."""
    found = _rows_of_study()
    rows = [
        [name, *(cell(found[task, each]) if (task, each) in found else "" for each in _OPTIMIZERS)]
        for task, name in TASKS.items()
        if any((task, each) in found for each in _OPTIMIZERS)
    ]
    return lines(["", *_OPTIMIZERS.values()], rows)


def _in_short() -> str:
    """Return the range of the gains over the tasks of a kind and their optimizers, a line a kind."""
    found, lined = _rows_of_study(), []
    for kind, tasks in _IN_SHORT.items():
        rows = [row for (task, _), row in found.items() if task in tasks]
        gains = [
            sorted(float(row[over].split()[0]) for row in rows)
            for over in ("over the best cosine", "over the best")
        ]
        times = sorted(float(row["extra time"].rstrip("%")) for row in rows)
        spans = [f"{values[0]:+.1f} to {values[-1]:+.1f}" for values in gains]
        least, most = (f"{time:.0f}" for time in (times[0], times[-1]))
        lined.append([kind, *spans, f"{least} %" if least == most else f"{least} to {most} %"])
    return lines(["task", "over the best cosine", "over the better of cosine and one cycle", "time added"], lined)


def _gains(row: Mapping[str, str]) -> str:
    cosine, best = (row[over].split()[0] for over in ("over the best cosine", "over the best"))
    few = f" ({row['seeds']})" if int(row["seeds"]) < 3 else ""
    return f"{cosine}, {best}{few}".replace(" ", TOGETHER)


def _early() -> str:
    (table,) = (
        each for each in read(f"{_RESULTS}/study/study.md") if each.section.endswith("test examples, early")
    )
    return lines(["", *_OPTIMIZERS.values()], ([TASKS[task], *cells] for task, *cells in table.rows))


def _held_back() -> str:
    """Return what AutoLR gains where labels are wrong, with and without examples held back."""
    (table,) = (each for each in read(f"{_RESULTS}/study/study.md") if each.section == "Examples held back")
    rows = [dict(zip(table.heads, row, strict=True)) for row in table.rows]
    plain, watching = (
        [row for row in rows if row[""].endswith(", held back") is watches] for watches in (False, True)
    )
    over = "over the best cosine"
    lined = [
        ["best cosine on all examples, %", *(row["cosine"].split(": ")[1] for row in plain)],
        [f"AutoLR {over}", *(row[over].split(" (")[0] for row in plain)],
        [f"AutoLR that watches a tenth of the examples, {over}", *(row[over].split(" (")[0] for row in watching)],
    ]
    return lines(["", *_OPTIMIZERS.values()], lined)


def _games() -> str:
    table = read(f"{_RESULTS}/games.md")[0]
    heads = ["", "figure", "Adam, constant", "Adam, cosine", "AutoLR", "AutoLR, `calibration_steps=0`"]
    return lines(heads, ([_GAMES[task], *cells] for task, *cells in table.rows))


def _auto(table: Table, of: str) -> tuple[str, Mapping[str, str]]:
    """Return the choice of "auto" and its row, of a table's rows that begin so."""
    (row,) = (row for row in table.rows if row[0] == of and row[1].startswith("auto ("))
    return row[1].removeprefix("auto (").rstrip(")"), dict(zip(table.heads, row, strict=True))


def _probe() -> str:
    rows = []
    for table in _by_model("probe.md"):
        chosen, seven = _auto(table, "7")
        every_ten = _auto(table, "3")[1]["every = 10"]
        rows.append([_model(table), chosen, seven["time / N forwards"], seven[_OVER_SOURCE], every_ten])
    heads = ["model", "evaluator chosen, 7 factors", "time / 7 plain forwards", "source's loop / it"]
    return lines([*heads, "3 factors every ten steps add"], rows)


def _gpu_probe() -> str:
    rows = []
    for table in _by_model("gpu/probe.md"):
        cells = [_model(table)]
        for n in "37":
            chosen, row = _auto(table, n)
            cells.append(f"{row[_OVER_SOURCE]} ({chosen})")
        cells.append(_auto(table, "3")[1]["every = 10"])
        cells += [row[table.heads.index("every = 10")] for row in table.rows if row[:2] == ["3", "graphed"]]
        rows.append(cells)
    heads = ["model", "source's loop / it, 3 factors", "7 factors", "3 factors every ten steps add", '`"graphed"`']
    return lines(heads, rows)


def _by_model(path: str) -> list[Table]:
    """Return the tables with a section a model."""
    return [table for table in read(f"{_RESULTS}/{path}") if ": " in table.section]


def _model(table: Table) -> str:
    return table.section.split(":")[0]


def _training(path: str) -> Callable[[], str]:
    def made() -> str:
        (table,) = read(f"{_RESULTS}/{path}")
        every = [dict(zip(table.heads, row, strict=True)) for row in table.rows]
        rows = []
        for model, of_model in groupby(every, key=lambda row: row["model"]):
            cells = {
                row["optimizer"]: f"{row['it adds']} of {row['cosine']}".replace(" ", TOGETHER) for row in of_model
            }
            rows.append([model, *(cells.get(optimizer, "") for optimizer in _OPTIMIZERS)])
        return lines(["added to a step", *_OPTIMIZERS.values()], rows)

    return made


def _tree(path: str) -> Callable[[], str]:
    def made() -> str:
        rows, sizes = [], ("1, 3", "2, 3", "3, 5", "4, 7")
        for table in _by_model(path):
            cells = [_auto(table, size) for size in sizes]
            rows.append([_model(table), *(f"{row['one after another / it']} ({chosen})" for chosen, row in cells)])
        return lines(["model", *(size.replace(", ", " x ") for size in sizes)], rows)

    return made


def _trainer() -> str:
    scratch, tuned = read(f"{_RESULTS}/trainer.md")
    over = "over the best linear"
    heads = ["", scratch.section, over, tuned.section, over]
    pairs = zip(scratch.rows, tuned.rows, strict=True)
    return lines(heads, ([one[0].removesuffix(" (best)"), *one[1:], *other[1:]] for one, other in pairs))


def _trainer_time() -> str:
    text = (ROOT / _RESULTS / "trainer.md").read_text(encoding="utf-8")
    times = re.findall(r"AutoLR (\S+) times linear", text)
    heads = ["CPU time of AutoLR's trainings", *(table.section for table in read(f"{_RESULTS}/trainer.md"))]
    return lines(heads, [["times that of the linear schedule", *times]])


def _paper() -> str:
    tables = read(f"{_RESULTS}/paper/schedulers.md")
    of_scale = {table.heads[1].split(", ")[1]: table for table in tables}
    (first, *_) = tables
    rows = []
    for place, row in enumerate(first.rows):
        cells = [of_scale[scale].rows[place][1] for scale in of_scale]
        rows.append([_code(row[0]), row[2], *cells])
    return lines(["", "the source's own figure", *of_scale], rows)


def _code(schedule: str) -> str:
    return f"`{schedule}`" if schedule.startswith("AutoLR") else schedule


TABLES: Mapping[str, Callable[[], str]] = {
    "demo": _demo,
    "demo accuracy": _demo_accuracy,
    "demo overhead": _demo_overhead,
    "early": _early,
    "extra time": lambda: _study(lambda row: row["extra time"]),
    "games": _games,
    "gpu probe": _gpu_probe,
    "gpu training": _training("gpu/training.md"),
    "gpu tree": _tree("gpu/tree.md"),
    "in short": _in_short,
    "held back": _held_back,
    "paper": _paper,
    "probe": _probe,
    "study": lambda: _study(_gains),
    "trainer": _trainer,
    "trainer time": _trainer_time,
    "training": _training("training.md"),
    "tree": _tree("tree.md"),
    "tree demo": _tree_demo,
}
"""Name in a page's mark -> what returns the table."""
