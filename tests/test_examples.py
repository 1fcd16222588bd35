import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("pyarrow")

from benchmarks.tests.test_paper_train import write_shard
from examples import accumulation, alr_tree, two_optimizers


def epochs_of(printed):
    return [(int(epoch), float(share)) for epoch, share in re.findall(r"epoch (\d+): .* accuracy (.*)%", printed)]


def test_tree_on_digits_goes_on_from_its_checkpoint(tmp_path, capsys):
    checkpoint = tmp_path / "tree.pt"
    argv = ["--lr", "0.01", "0.1", "--checkpoint", str(checkpoint), "--epochs"]
    alr_tree.main([*argv, "2"])
    assert [epoch for epoch, _ in epochs_of(capsys.readouterr().out)] == [1, 2]
    torch.rand(3)
    alr_tree.main([*argv, "4"])
    epochs = epochs_of(capsys.readouterr().out)
    assert [epoch for epoch, _ in epochs] == [3, 4]
    assert epochs[-1][1] > 90


def test_tree_on_images(tmp_path, capsys, monkeypatch):
    write_shard(tmp_path / "train-0.parquet", 30, seed=1)
    write_shard(tmp_path / "test-0.parquet", 10, seed=2)
    monkeypatch.chdir(tmp_path)
    alr_tree.main(["--data", str(tmp_path), "--epochs", "1", "--batch-size", "16"])
    assert len(epochs_of(capsys.readouterr().out)) == 1


def test_two_optimizers(capsys):
    two_optimizers.main()
    level, accuracy = re.findall(r"level (.*), test accuracy (.*)%", capsys.readouterr().out)[0]
    assert float(level) > 1e-4
    assert float(accuracy) > 90


def test_accumulation(capsys):
    accumulation.main()
    printed = capsys.readouterr().out
    assert float(re.findall(r"^loss (\S+),", printed)[0]) < 0.05
    assert "Probe(step=70, " in printed
