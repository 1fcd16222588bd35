"""What the README says runs, and its figures are those of the results it names."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from autolr_fast import AutoLR

from .helpers import mlp, problem, sgd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOP, EQUIVALENT, END, SEVERAL, TREE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loop_runs_as_it_stands():
    model = mlp()
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    scope = {"torch": torch, "model": model, "loss_fn": F.cross_entropy, "loader": [(x, y)] * 20, "epochs": 3}
    first = F.cross_entropy(model(x), y).item()
    exec(LOOP, scope)
    assert scope["scheduler"].last_probe.step == 30  # the second half has none
    assert F.cross_entropy(model(x), y).item() < 0.5 * first


@pytest.mark.parametrize("share", [0.03, 0.7, 40.0])
def test_the_equivalent_is_equivalent(share):
    """The heat is that of a training, and the move that of a heat which is this share of the gain."""
    model, _ = problem("mlp")
    optimizer = sgd(model, momentum=0.9)
    scheduler = AutoLR(optimizer, model, calibration_steps=0, probe_every_steps=12)
    heat, history, scope = scheduler._level.heat, [], {}
    for step in range(1, 13):
        x, y = torch.randn(12, 5), torch.randint(3, (12,))
        history.append([p.detach().clone() for p in model.parameters()])
        optimizer.zero_grad()
        loss = scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y))
        loss.backward()
        if step == 12:
            scope = {"copy": copy, "model": model, "loss_fn": F.cross_entropy, "x": x, "y": y, "loss": loss}
            scope |= {"ten_steps_before": history[-11], "before_this_step": history[-1], "gain": 1.0, "lr": 1.0}
            exec(EQUIVALENT, scope)
        optimizer.step()
        scheduler.step()
    found = (scheduler.last_probe.losses[1] - scheduler.last_probe.losses[0]).item()
    assert found == pytest.approx(scope["heat"], rel=1e-3)
    gain = abs(found) / share
    means = [gain / (4 * math.log(2)), 0.0]
    heat.load({**heat.state(), "heats": [abs(found)] * 5, "means": means, "most": gain, "is_lowest": True})
    scope |= {"loss": loss.detach() - scope["heat"] + abs(scope["heat"]), "gain": gain, "lr": 1.0}
    exec(EQUIVALENT, scope)
    moved = heat.temper(torch.tensor(1.2, dtype=torch.float64)).item()
    assert moved == pytest.approx(scope["lr"], rel=1e-3)


def test_the_end_runs_as_it_stands():
    """A held-back loss that rises ends a training of no known length."""
    model, _ = problem("mlp")
    optimizer, seen = sgd(model), []

    def train_some_steps():
        for _ in range(10):
            optimizer.zero_grad()
            x, y = torch.randn(12, 5), torch.randint(3, (12,))
            scope["scheduler"].loss(lambda x=x, y=y: F.cross_entropy(model(x), y)).backward()
            optimizer.step()
            scope["scheduler"].step()

    def validation_loss():
        seen.append(2 + abs(len(seen) - 10) / 10)
        return seen[-1]

    scope = {"AutoLR": AutoLR, "model": model, "optimizer": optimizer}
    scope |= {"train_some_steps": train_some_steps, "validation_loss": validation_loss}
    exec(END, scope)
    assert 14 < len(seen) < 40
    assert scope["scheduler"].has_ended


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
