"""What the pages of docs/ say runs, their figures are those of the results, and their links lead somewhere."""

import copy
import doctest
import math
import re

import pytest
import torch
import torch.nn.functional as F

import autolr_fast
from autolr_fast import AutoLR, rule
from benchmarks.pages.markdown import fill
from benchmarks.pages.tables import TABLES

from .helpers import mlp, problem, sgd
from .pages import PAGES, REPOSITORY, ROOT, anchors_of, links_of, python_of, sentences_of, text_of

LOOP, LOOK = python_of("docs/index.md")
(EQUIVALENT,) = python_of("docs/how.md")
(END,) = python_of("docs/ending.md")
(SEVERAL,) = python_of("docs/optimizers.md")
(TREE,) = python_of("docs/alr_tree.md")
(SAVE,) = python_of("docs/checkpoints.md")
LOG, _ = python_of("docs/looking.md")


def test_the_loop_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """So do the lines that look at it, and that write its log."""
    monkeypatch.chdir(tmp_path)
    model = mlp()
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    scope = {"model": model, "loss_fn": F.cross_entropy, "loader": [(x, y)] * 20, "epochs": 3}
    first = F.cross_entropy(model(x), y).item()
    exec(LOOP, scope)
    assert scope["scheduler"].last_probe.step == 30  # the second half has none
    assert F.cross_entropy(model(x), y).item() < 0.5 * first
    exec(LOG, scope)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == len(scope["scheduler"].history)
    pytest.importorskip("matplotlib")
    exec(LOOK, scope)
    assert capsys.readouterr().out.startswith("Probe(step=30, ")
    assert (tmp_path / "run.png").stat().st_size > 10_000


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


@pytest.mark.cpu
def test_a_checkpoint_is_saved_and_loaded_as_it_stands(tmp_path):
    """The run goes on from it as it did after it was saved, bit for bit."""
    save, load = SAVE.split("\n\n")
    model, _ = problem("mlp")
    optimizer = sgd(model, momentum=0.9)
    scope = {"torch": torch, "model": model, "optimizer": optimizer, "path": tmp_path / "state.pt"}
    scope["scheduler"] = scheduler = AutoLR(optimizer, model, total_steps=100)

    def train(steps):
        for _ in range(steps):
            x, y = torch.randn(12, 5), torch.randint(3, (12,))
            optimizer.zero_grad()
            scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y)).backward()
            optimizer.step()
            scheduler.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    train(25)
    exec(save, scope)
    once = train(20)
    exec(load, scope)
    assert all(map(torch.equal, train(20), once))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_the_examples_of_transformers_run(tmp_path, monkeypatch):
    """Doctests leave them out, since transformers may not be there."""
    transformers = pytest.importorskip("transformers")
    from autolr_fast.integrations import transformers as integration  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^ *>>> (.*?)(?:  # doctest.*)?$", integration.attach.__doc__, re.MULTILINE)
    options = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **options))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(20, (64, 6)).tolist()]
    scope = {"model": model, "train_set": rows, "attach": integration.attach}
    exec("\n".join(code), scope)
    assert isinstance(scope["trainer"].lr_scheduler, AutoLR)
    assert scope["trainer"].lr_scheduler.last_probe.step > 1


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_tables_are_those_of_the_results(page):
    """``python -m benchmarks.pages --tables`` fills them anew."""
    assert fill(text_of(page), TABLES) == text_of(page)


def test_the_table_in_short_spans_that_of_all_tasks():
    cell = r"([+-]\S+),.(?:[+-]\S+)(?:.\(\d\))?"  # over the best cosine, over all
    rows = re.findall(rf"^\| text, \w+ \| {cell} \| {cell} \| {cell} \|$", text_of("docs/evidence.md"), re.M)
    (short,) = re.findall(r"^\| text from scratch, % of the loss \| (\S+) to (\S+) \|", text_of("README.md"), re.M)
    gains = [float(gain) for row in rows for gain in row]
    assert len(gains) == 9
    assert [float(each) for each in short] == [min(gains), max(gains)]


def test_figures_are_in_the_results():
    """Each table of figures, by what can be found in its results without reading its code."""
    demo, costs, tree = (text_of(page) for page in ("docs/index.md", "docs/cost.md", "docs/alr_tree.md"))
    runs = re.findall(r"^\| ([\d.]+) \| (\S+) \| (\S+) \|", text_of("docs/pictures/demo.md"), re.MULTILINE)
    for schedule in dict.fromkeys(schedule for _, schedule, _ in runs):
        accuracies = [accuracy for _, name, accuracy in runs if name == schedule]
        assert f"| {schedule} | {' | '.join(accuracies)} |" in demo.replace("**", "").replace("`", "")
    results = text_of("benchmarks/results/probe.md")
    models = re.findall(r"^## ([\w ]+): (.*?)(?=^## )", results, re.MULTILINE | re.DOTALL)
    small = ["mlp", "perceptron", "small convnet", "convnet"]
    assert [name for name, _ in models] == [*small, "resnet18", "transformer"]
    for name, section in models:
        seven = re.search(r"^\| 7 \| auto \((\w+)\) \| \S+ ms \| (\S+) \| (\S+) \|", section, re.MULTILINE).groups()
        three = re.search(r"^\| 3 \| auto \(\w+\) \| \S+ ms(?: \| \S+){3} \| (\S+) \|", section, re.MULTILINE)
        assert f"| {' | '.join((name, *seven, three[1]))} |" in costs
    sections = re.findall(
        r"^## (\w+): (.*?)(?=^## )", text_of("benchmarks/results/tree.md"), re.MULTILINE | re.DOTALL
    )
    assert len(sections) == 3
    for model, section in sections:
        rows = re.findall(r"^\| \d, \d \| auto \((\w+)\) \| \S+ ms \| (\S+) \|", section, re.MULTILINE)
        assert f"| {model} | {' | '.join(f'{gain} ({ran})' for ran, gain in rows)} |" in tree


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_is_long(page):
    long = [sentence for sentence in sentences_of(page) if len(sentence.split()) >= 25]
    assert not long


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Those of the site to a page, a heading or a picture; those of the repository to a file of it."""
    for link in links_of(page):
        target, _, anchor = link.partition("#")
        if link.startswith(REPOSITORY):
            file = target.removeprefix(REPOSITORY).removeprefix("/blob/main/").removeprefix("/tree/main/")
        elif link.startswith("http"):
            continue
        else:
            path = (ROOT / page).parent / target if target else ROOT / page
            file = path.resolve().relative_to(ROOT.resolve()).as_posix()
            assert file.startswith("docs/"), link
        assert (ROOT / file).exists(), link
        assert not anchor or anchor in anchors_of(file), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(page.removeprefix("docs/") in navigation for page in PAGES)


def test_every_public_name_is_in_the_reference_with_an_example():
    reference = "".join(text_of(page) for page in PAGES if page.startswith("docs/api/"))
    for name in set(autolr_fast.__all__) - {"__version__"}:
        assert f"::: autolr_fast.{name}\n" in reference
        assert name.startswith("FACTORS_") or ">>>" in getattr(autolr_fast, name).__doc__, name


def test_the_examples_of_factors_run():
    """doctest sees no strings under constants."""
    texts = re.findall(r'^FACTORS_\d[^\n]*\n"""(.*?)"""', text_of("autolr_fast/rule.py"), re.MULTILINE | re.DOTALL)
    assert len(texts) == 4
    for text in texts:
        example = doctest.DocTestParser().get_doctest(text, dict(vars(rule)), "FACTORS", "rule.py", 0)
        assert doctest.DocTestRunner().run(example) == (0, 1)
