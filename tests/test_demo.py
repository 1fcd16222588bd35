import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from autolr_fast.__main__ import main
from autolr_fast.demo import schedules as demo

pytest.importorskip("sklearn")
Figure = pytest.importorskip("matplotlib.figure").Figure


def test_demo_trains_every_schedule_from_every_start(tmp_path, capsys):
    out = tmp_path / "new" / "demo.png"
    main(["demo", "--lr", "0.001", "0.1", "--epochs", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    table = out.with_suffix(".md").read_text()
    assert table in printed
    for path in (out, out.with_suffix(".md"), tmp_path / "new" / "demo_run.png"):
        assert f"wrote {path}\n" in printed
    assert (tmp_path / "new" / "demo_run.png").read_bytes().startswith(b"\x89PNG")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"
    ]
    header, _, *rows = cells
    assert header == ["lr0", "schedule", "test accuracy", "test loss", "lr halfway", "time", "overhead"]
    assert [row[:2] for row in rows] == [
        [lr, schedule]
        for lr in ("0.001", "0.1")
        for schedule in ("constant", "linear", "cosine", "step", "AutoLR.paper", "AutoLR")
    ]
    worst = min(row[2] for row in rows if row[1] == "constant")
    assert f"Worst of the starts: constant {worst}," in table
    assert "--optimizer sgd --epochs 2 --seed 0 --lr 0.001 0.1`" in table
    assert f"torch {torch.__version__}" in table


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_demo_of_the_tree(tmp_path, capsys, optimizer):
    out = tmp_path / "tree.png"
    starts = ["0.001", "0.1"]
    main(["demo", "--tree", "--lr", *starts, "--epochs", "4", "--optimizer", optimizer, "--out", str(out)])
    printed = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    text = out.with_suffix(".md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"][2:]
    assert [row[:2] for row in rows] == [["1", "6"], ["2", "6"], ["3", "6"], ["4", "6"]]
    losses = [float(row[3]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    accuracy = float(text.partition("Test accuracy of the best model ")[2].partition("%")[0])
    assert accuracy > 90
    assert f"demo --tree --optimizer {optimizer} --epochs 4 --seed 0 --lr 0.001 0.1`" in text
    assert all(line in printed for line in text.splitlines() if line[:1] == "|")


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_autolr_learns_the_digits_from_a_start_where_cosine_does_not(optimizer):
    digits = demo.load_digits(seed=0)
    setting = {"optimizer": optimizer, "lr": 1e-5, "total_steps": 132, "seed": 0}
    cosine, auto = (demo.train(digits, schedule, **setting) for schedule in ("cosine", "AutoLR"))
    assert cosine.accuracy < 0.5
    assert auto.accuracy > 0.95
    assert auto.lr_halfway > 100 * cosine.lr_halfway
    assert auto.curve.losses[-1] < auto.curve.losses[0]
    assert auto.overhead > cosine.overhead > 0
    lrs = [
        auto.scheduler.history[0].lr_before[0],
        auto.scheduler.history[9].lr_after[0],
        auto.scheduler.get_lr()[0],
    ]
    assert [auto.curve.lrs[0], auto.curve.lrs[1], auto.curve.lrs[-1]] == lrs
    assert auto.scheduler.last_epoch == 132


def test_the_run_that_is_drawn_is_of_the_middle_start(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(demo, "plot", lambda scheduler, **texts: drawn.append((scheduler, texts)) or Figure())
    monkeypatch.setattr(demo, "_SCHEDULES", ("cosine", "AutoLR"))
    main(["demo", "--lr", "0.1", "0.001", "0.01", "--epochs", "1", "--out", str(tmp_path / "demo.png")])
    [(scheduler, texts)] = drawn
    assert scheduler.base_lrs == [0.01]
    assert scheduler.last_epoch == 33
    assert texts["title"] == "AutoLR on digits, SGD, from a learning rate of 0.01"
    assert "--epochs 1 --seed 0 --lr 0.1 0.001 0.01 " in texts["footer"]


def test_digits_are_split_without_overlap():
    digits = demo.load_digits(seed=1)
    assert [len(labels) for _, labels in digits] == [1078, 359, 360]
    assert digits.train[0].shape == (1078, 1, 8, 8)
    assert digits.train[0].max() == 1
    images = torch.cat([images for images, _ in digits]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert sum(p.numel() for p in demo.network().parameters()) == 24058


def test_baselines_by_hand():
    expected = {"constant": [1, 1, 1, 1], "linear": [1, 2 / 3, 1 / 3, 0], "cosine": [1, 0.75, 0.25, 0],
                "step": [1, 0.1, 0.01, 0.001]}  # fmt: skip
    for name, make in demo.BASELINES.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = make(optimizer, 3)
        assert isinstance(scheduler, LRScheduler)
        lrs = [scheduler.get_last_lr()[0]]
        for _ in range(3):
            optimizer.step()
            scheduler.step()
            lrs.append(scheduler.get_last_lr()[0])
        assert lrs == pytest.approx(expected[name], abs=1e-12)
