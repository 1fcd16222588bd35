"""The benchmark of the Trainer writes its table."""

import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("cpuinfo")

from benchmarks import trainer


def test_the_table_has_a_row_for_each_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "STARTS", (1e-6,))
    monkeypatch.setattr(trainer, "GRID", (1e-9, 1e-2))
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 200, encoding="utf-8")
    trainer.main(["--text", str(text), "--seeds", "1", "--steps", "4", "--results", str(tmp_path)])
    page = (tmp_path / "trainer.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+, from \S+)( \(best\))? \| (\S+) ± 0.000 \| (\S+)% \|$", page, flags=re.MULTILINE)
    names = ["AutoLR, from 1e-06", "linear, from 1e-09", "linear, from 0.01"]
    assert [name for name, *_ in rows] == names * 2
    assert [name for name, is_best, *_ in rows if is_best] == names[2:] * 2
    for ours, stays, falls in (rows[:3], rows[3:]):
        assert float(falls[2]) < float(stays[2])
        assert float(ours[2]) < float(stays[2])
        assert float(ours[3]) == pytest.approx(100 * (float(ours[2]) / float(falls[2]) - 1), abs=0.2)
    assert "seed 0, fine-tuning, AutoLR, from 1e-06: " in capsys.readouterr().out
