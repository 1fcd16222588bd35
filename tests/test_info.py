import torch

from autolr_fast import __version__
from autolr_fast import _ops as ops
from autolr_fast.__main__ import main


def test_info_names_versions_and_what_serves(capsys, monkeypatch):
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    main(["info"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"autolr_fast {__version__}, torch {torch.__version__}, python 3.")
    assert f"| cpu | {ops.choose('cpu')} | **serves** |" in printed
    assert printed.count("**serves**") == 1 + torch.cuda.is_available()
    for backend, reason in ops.explain("cpu"):
        assert f"| cpu | {backend} | {reason}" in printed


def test_info_says_that_one_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv(ops.VARIABLE, "torch")
    main(["info"])
    assert "AUTOLR_FAST_BACKEND=torch asks for one backend" in capsys.readouterr().out
