"""What is run: the experiments, their settings, and the scales they are run at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["EXPERIMENTS", "SCALES", "SOURCE", "Experiment", "Setting", "arguments"]

Options = Mapping[str, Any]
"""Options of ``benchmarks.paper.train`` without their dashes; ``False`` is ``--no-...``."""


class Setting(NamedTuple):
    """One line of a table: a name, what differs from the scale's options, and the panel it is drawn in."""

    label: str
    options: Options
    panel: str = ""


class Experiment(NamedTuple):
    """A question and the settings that answer it.

    Attributes:
        title: of table and picture.
        question: in a sentence or two, what is compared.
        settings: in the order of the table.
        columns: of the table, names in :data:`~benchmarks.paper.tables.COLUMNS`.
    """

    title: str
    question: str
    settings: tuple[Setting, ...]
    columns: tuple[str, ...]


# What the source reaches is what networks trained without augmentation reach.
_EVERYWHERE: Options = {"augment": False, "evaluator": "inplace"}
_SMALL: Options = {**_EVERYWHERE, "width": 8, "limit": 10_000, "validation": 2_000, "epochs": 5, "eval-every": 156}
SCALES: Mapping[str, Options] = {
    "small": _SMALL,
    "long": {**_SMALL, "epochs": 20, "eval-every": 312},
    "full": {**_EVERYWHERE, "checkpoint-every": 5_000},  # a checkpoint takes as long as a hundred steps of a GPU
    "toy": {**_EVERYWHERE, "width": 2, "limit": 24, "validation": 8, "test-limit": 8, "batch-size": 8, "epochs": 4},
}
"""Options of every run at a scale. The others are train's defaults: lr 0.005, batch 32, plain SGD, 100 epochs."""

SOURCE: Mapping[str, float] = {
    "constant": 83.5,
    "linear": 85.2,
    "cosine": 85.0,
    "step": 84.4,
    "AutoLR.paper": 87.0,
}
"""Test accuracy in %, as the source has it: ResNet-18, CIFAR-10, lr0 0.005, batch 32, 100 epochs."""

_PAPER: Options = {"scheduler": "paper"}
_EVERY_10 = {**_PAPER, "every": 10}
_MOMENTUM = {"momentum": 0.9}
_INDEPENDENT = {"score-batch": "independent"}
_RESULT = ("accuracy", "best validation", "loss", "lr after an epoch", "lr at the end", "seeds")


def _scoring_batches() -> Iterator[Setting]:
    panels: Mapping[str, Options] = {"independent images": _INDEPENDENT, "the training batch's images first": {}}
    for (panel, batch), size in itertools.product(panels.items(), (8, 32, 128, 512)):
        # As many images as the training batch has are the default.
        sized = {} if size == 32 else {"score-batch-size": size}
        yield Setting(f"{panel}, {size}", {**_EVERY_10, **batch, **sized}, panel)


def _from_1() -> Iterator[Setting]:
    settings: Mapping[str, Options] = {
        "constant": {"scheduler": "constant"},
        "Factor_7": {**_PAPER, "factors": 7},
        "wide factors": {**_PAPER, "factors": "wide"},
        "Factor_7, calibrated": {**_PAPER, "factors": 7, "calibrate": 20},
        "AutoLR": {"scheduler": "auto"},
    }
    for panel, momentum in (("SGD", {}), ("SGD, momentum 0.9", _MOMENTUM)):
        for label, options in settings.items():
            yield Setting(f"{panel}: {label}", {**options, **momentum, "lr": 1.0}, panel)


def _readings() -> Iterator[Setting]:
    often: Mapping[str, Options] = {"every step": {}, "every 10": {"every": 10}, "every epoch": {"every": "epoch"}}
    directions: Mapping[str, Options] = {"last step": {}, "fresh gradient": {"direction": "gradient"}}
    batches: Mapping[str, Options] = {"training batch": {}, "independent batch": _INDEPENDENT}
    for direction, batch in itertools.product(directions, batches):
        panel = f"{direction}, {batch}"
        for every, options in often.items():
            setting = {**_PAPER, **directions[direction], **batches[batch], **options}
            yield Setting(f"{panel}, {every}", setting, panel)
    panel = "momentum 0.9"
    yield Setting(f"{panel}, constant", {"scheduler": "constant", **_MOMENTUM}, panel)
    for every, options in often.items():
        yield Setting(f"{panel}, {every}", {**_PAPER, **_MOMENTUM, **options}, panel)


EXPERIMENTS: Mapping[str, Experiment] = {
    "schedulers": Experiment(
        "Schedulers",
        "ResNet-18 from lr0 = 0.005, under the schedules that the source compares: step is a tenth at "
        "each third, linear and cosine end at zero. AutoLR.paper is the source's rule (last step, training batch, "
        "Factor_3, every step); AutoLR, which the source does not have, is this package's default.",
        (
            *(Setting(name, {"scheduler": name}) for name in ("constant", "linear", "cosine", "step")),
            Setting("AutoLR.paper", _PAPER),
            Setting("AutoLR", {"scheduler": "auto"}),
        ),
        ("accuracy", "source", *_RESULT[1:]),
    ),
    "factors": Experiment(
        "Number of factors",
        "AutoLR.paper with Factor_3 = [2, 1, 1/2], Factor_5 = [4, 2, 1, 1/2, 1/8] and "
        "Factor_7 = [8, 4, 2, 1, 1/2, 1/4, 1/8], as the source lists them. The source compares them on CIFAR-100.",
        (
            Setting("Factor_3", _PAPER),
            Setting("Factor_5", {**_PAPER, "factors": 5}),
            Setting("Factor_7", {**_PAPER, "factors": 7}),
        ),
        _RESULT,
    ),
    "batches": Experiment(
        "Batch size used for scoring",
        "AutoLR.paper, a probe every 10 steps, scored on 8 to 512 images, while training keeps its batches of 32. "
        "Either all of these are drawn independently of the training batch, or the training batch is among them: "
        "its first images, and where these are too few, drawn ones in addition.",
        tuple(_scoring_batches()),
        _RESULT,
    ),
    "lr1": Experiment(
        "From lr0 = 1",
        "The source reports that training from lr0 = 1 diverges with Factor_7, and supposes that wider factors "
        "would help. Wide factors are [64, 16, 4, 1, 1/4, 1/16, 1/64]. Calibrated: the first step is searched and "
        "taken again, as this package's default does; the rest as in the source. The source does not say whether "
        "there is momentum.",
        tuple(_from_1()),
        ("accuracy", "highest training loss", "not finite", *_RESULT[3:]),
    ),
    "scores": Experiment(
        "Scores and normalisations",
        "AutoLR.paper with other ways to weigh the losses L: exp(-x) of losses that are min-max scaled, "
        "standardised, divided by their sum, or replaced by their rank; a softmax of -L / T; the improvement over "
        "the unscaled step's loss (in shares of it, where staying weighs 0.01). A probe moves the rate by |log2 "
        "factor|; that follows the losses' range if the two have a rank correlation over the probes of a run.",
        (
            Setting("exp, min-max", _PAPER),
            Setting("exp, z-score", {**_PAPER, "score": "zscore"}),
            Setting("exp, sum", {**_PAPER, "score": "sum"}),
            Setting("exp, rank", {**_PAPER, "score": "rank"}),
            Setting("softmax, T = 0.1", {**_PAPER, "score": "softmax-0.1"}),
            Setting("softmax, T = 0.01", {**_PAPER, "score": "softmax-0.01"}),
            Setting("improvement", {**_PAPER, "score": "improvement"}),
        ),
        ("accuracy", "move", "follows the range", *_RESULT[1:]),
    ),
    "readings": Experiment(
        "What the slides leave open",
        "How often the rate is moved (every step, every 10, once an epoch), along which direction (the last step; "
        "a fresh gradient of the scored batch), and on which batch (the training batch; an independent one of the "
        "same size). The last lines have the first of these readings with momentum.",
        tuple(_readings()),
        _RESULT,
    ),
    "cost": Experiment(
        "Cost",
        "Time (evaluation apart), the share of it spent in probes, and peak memory, which on a CPU is the resident "
        "memory of the whole process, PyTorch and images included. Two runs went on side by side: compare shares "
        "rather than seconds.",
        (
            Setting("constant", {"scheduler": "constant"}),
            Setting("AutoLR.paper, Factor_3", _PAPER),
            Setting("AutoLR.paper, Factor_5", {**_PAPER, "factors": 5}),
            Setting("AutoLR.paper, Factor_7", {**_PAPER, "factors": 7}),
            Setting("fresh gradient", {**_PAPER, "direction": "gradient"}),
            Setting("every 10", _EVERY_10),
            Setting("every 10, scored on 512", {**_EVERY_10, "score-batch-size": 512}),
            Setting("every epoch", {**_PAPER, "every": "epoch"}),
            Setting("AutoLR", {"scheduler": "auto"}),
        ),
        ("seconds", "share in probes", "times constant", "memory", "seeds"),
    ),
}


def arguments(options: Options) -> list[str]:
    """Return options as a command line has them.

    Example:
        >>> arguments({"lr": 0.1, "augment": False})
        ['--lr', '0.1', '--no-augment']
    """
    words = []
    for name, value in options.items():
        words += [f"--no-{name}"] if value is False else [f"--{name}", str(value)]
    return words
