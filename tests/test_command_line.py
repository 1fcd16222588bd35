"""``python -m autolr_fast``: what it writes, and what it says of what the user is to mend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autolr_fast import AutoLR, __version__
from autolr_fast import __main__ as command_line
from autolr_fast.__main__ import main
from autolr_fast.demo import schedules

from .helpers import problem, sgd


@pytest.fixture(scope="module")
def history():
    torch.manual_seed(0)
    model, loss_of = problem("mlp")
    optimizer = sgd(model, lr=1e-3)
    scheduler = AutoLR(optimizer, model, total_steps=60, evaluator="inplace")
    for _ in range(40):
        optimizer.zero_grad()
        scheduler.loss(lambda: loss_of(model)).backward()
        optimizer.step()
        scheduler.step()
    return scheduler.history


@pytest.fixture
def log(history, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(probe.to_dict()) + "\n" for probe in history))
    return path


def refusal(capsys, *argv):
    """What a command line that is refused says, on its last line; its exit code is 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_plot_draws_what_was_logged(log, history, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, plot = [], command_line.plot
    monkeypatch.setattr(command_line, "plot", lambda run, **texts: drawn.append((run, texts)) or plot(run, **texts))
    main(["plot", str(log)])
    assert log.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"wrote {log.with_suffix('.png')}\n"
    [(read, texts)] = drawn
    assert [each.to_dict() for each in read] == [each.to_dict() for each in history]
    assert texts["group"] == 0
    assert "run.jsonl" in texts["title"]

    out = log.parent / "new" / "folder" / "picture.svg"
    main(["plot", str(log), "--out", str(out)])
    assert "<svg" in out.read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "No such file or directory: "),
        (lambda text: "", "run.jsonl is empty: write each probe"),
        (lambda text: text + "\n3\n", "line {next} of {log} is not a probe (3 of type 'int' is not a dict): write"),
        (lambda text: text + '\n{"step": 1\n', "line {next} of {log} is not JSON (Expecting ',' delimiter"),
        (lambda text: "\0\xff" + text, "line 1 of {log} is not JSON ("),
        (lambda text: text.replace('"step"', '"at"', 1), "line 1 of {log} is not a probe (Probe.__init__() got an"),
        (
            lambda text: text.replace('"losses": [', '"losses": [1.0, ', 1),
            "is not a probe (factors, losses and",
        ),
        (
            lambda text: text.replace('"lr_after": [', '"lr_after": [1.0, ', 1),
            "(lr_before, lr_after and level_after",
        ),
        (
            lambda text: text.replace('"step": 1,', '"step": "one",'),
            "is not a probe ('str' object cannot",
        ),
        (lambda text: text + text, "has a probe of step 1 after one of step "),
    ],
)
def test_a_log_that_is_none_is_told(change, says, log, capsys):
    text = log.read_text()
    log.unlink()
    if change:
        log.write_text(change(text), encoding="latin-1")
    told = refusal(capsys, "plot", log)
    assert told.startswith("python -m autolr_fast plot: error: ")
    assert says.format(log=log, next=text.count("\n") + 2) in told


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--out", "run.txt"], "argument --out: 'run.txt' is not the name of a picture: end it with .png, .svg"),
        (["--group", "1"], "group=1 is not the index of one of 1 param groups"),
        (["--out", "{log}/run.png"], "run.jsonl"),
    ],
)
def test_arguments_of_plot(argv, says, log, capsys):
    pytest.importorskip("matplotlib")
    assert says in refusal(capsys, "plot", log, *(each.format(log=log) for each in argv))
    assert list(log.parent.iterdir()) == [log]


def test_a_folder_that_cannot_be_written_to_is_told_before_training(log, capsys, monkeypatch):
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.setattr(schedules, "main", lambda args: pytest.fail("trained"))
    monkeypatch.setattr(command_line.os, "access", lambda path, mode: False)
    assert "cannot be written to: give another --out" in refusal(capsys, "demo", "--out", log.parent / "demo.png")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["plot"], "the following arguments are required: LOG"),
        (["demo", "--lr", "0"], "'0' cannot be used; give a positive float"),
        (["demo", "--epochs", "1.5"], "'1.5' cannot be used; give a positive int"),
        (["demo", "--optimizer", "adam"], "invalid choice: 'adam'"),
        (["demo", "--out", "table.md"], "'table.md' is not the name of a picture: end it with .png"),
    ],
)
def test_bad_arguments(argv, says, capsys):
    assert says in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "package", "extra"),
    [
        (["demo"], "sklearn", "demo"),
        (["demo", "--tree"], "matplotlib", "demo"),
        (["plot", "log"], "matplotlib", "plot"),
    ],
)
def test_missing_extra_is_named(argv, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    told = refusal(capsys, *argv)
    assert package in told
    assert f"pip install 'autolr_fast[{extra}]'" in told


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_as_a_program_it_ends_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "autolr_fast", "plot", str(tmp_path / "none.jsonl")]
    root = Path(command_line.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 2
