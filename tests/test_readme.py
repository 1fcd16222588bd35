"""What the README says runs, and its figures are those of the results it names."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from autolr_fast import FACTORS_2, AutoLR, Rule

from .helpers import mlp, problem, sgd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOP, EQUIVALENT, SEVERAL, TREE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loop_runs_as_it_stands():
    model = mlp()
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    scope = {"torch": torch, "model": model, "loss_fn": F.cross_entropy, "loader": [(x, y)] * 20, "epochs": 3}
    first = F.cross_entropy(model(x), y).item()
    exec(LOOP, scope)
    assert scope["scheduler"].last_probe.step == 30  # the second half has none
    assert F.cross_entropy(model(x), y).item() < 0.5 * first


def test_the_equivalent_is_equivalent():
    model, _ = problem("mlp")
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    optimizer = sgd(model, momentum=0.9)
    scheduler = AutoLR(optimizer, model, calibration_steps=0, probe_every_steps=1, rule=Rule(window_steps=1))
    loss = scheduler.loss(lambda: F.cross_entropy(model(x), y))
    scope = {"copy": copy, "math": math, "model": model, "loss_fn": F.cross_entropy, "x": x, "y": y}
    scope |= {"factors": FACTORS_2, "lr": 0.1, "prev": [p.detach().clone() for p in model.parameters()]}
    loss.backward()
    optimizer.step()
    exec(EQUIVALENT, scope)
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(scope["lr"], rel=1e-4)
    assert scope["lr"] != 0.1


def test_several_optimizers_run_as_they_stand():
    model = mlp()
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    scope = {"torch": torch, "AutoLR": AutoLR, "model": model, "loader": [(x, y)] * 20, "epochs": 3}
    exec(SEVERAL, scope)
    scheduler, first = scope["scheduler"], F.cross_entropy(model(x), y).item()
    for _ in range(60):
        model.zero_grad()
        scheduler.loss(lambda: F.cross_entropy(model(x), y)).backward()
        scope["muon"].step()
        scope["adamw"].step()
        scheduler.step()
    assert scheduler.last_epoch == 60  # one step for both
    assert scheduler.last_probe.step == 30
    assert F.cross_entropy(model(x), y).item() < 0.5 * first


def test_the_tree_runs_as_it_stands(capsys):
    model, loader = mlp(), [(torch.randn(12, 5), torch.randint(3, (12,)))] * 4
    first = F.cross_entropy(model(loader[0][0]), loader[0][1]).item()
    exec(TREE, {"model": model, "loss_fn": F.cross_entropy, "loader": loader})
    assert capsys.readouterr().out.count("Epoch(number=") == 10
    assert F.cross_entropy(model(loader[0][0]), loader[0][1]).item() < 0.5 * first


def test_the_table_is_that_of_the_demo():
    results = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    runs = re.findall(r"^\| (\S+) \| (\S+) \| (\S+) \|.*?(\S+) \|$", results, re.MULTILINE)
    runs = [run for run in runs if run[0] not in ("lr0", "---")]
    starts = list(dict.fromkeys(lr0 for lr0, *_ in runs))
    assert f"| schedule | {' | '.join(starts)} |" in README
    for schedule in dict.fromkeys(schedule for _, schedule, *_ in runs):
        accuracies = [accuracy for _, name, accuracy, _ in runs if name == schedule]
        assert f"| {schedule} | {' | '.join(accuracies)} |" in README.replace("**", "").replace("`", "")
    overheads = [float(overhead.rstrip("%")) for _, name, _, overhead in runs if name == "AutoLR"]
    assert f"{min(overheads):.0f} to {max(overheads):.0f} % of the training time" in README


def test_the_costs_are_those_measured():
    results = (ROOT / "benchmarks/results/probe.md").read_text(encoding="utf-8")
    models = re.findall(r"^## (\w+): (.*?)(?=^## )", results, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in models] == ["mlp", "convnet", "resnet18", "transformer"]
    for name, section in models:
        seven = re.search(r"^\| 7 \| auto \((\w+)\) \| \S+ ms \| (\S+) \| (\S+) \|", section, re.MULTILINE).groups()
        three = re.search(r"^\| 3 \| auto \(\w+\) \| \S+ ms(?: \| \S+){3} \| (\S+) \|", section, re.MULTILINE)
        assert f"| {' | '.join((name, *seven, three[1]))} |" in README


def test_the_gains_of_the_tree_are_those_measured():
    results = (ROOT / "benchmarks/results/tree.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+): (.*?)(?=^## )", results, re.MULTILINE | re.DOTALL)
    assert len(sections) == 3
    for model, section in sections:
        rows = re.findall(r"^\| \d, \d \| auto \((\w+)\) \| \S+ ms \| (\S+) \|", section, re.MULTILINE)
        assert f"| {model} | {' | '.join(f'{gain} ({ran})' for ran, gain in rows)} |" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
