"""The examples print what they should; tests/test_accelerate.py, _lightning and _transformers run the others."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

from autolr_fast.demo import load_digits

pytest.importorskip("sklearn")

pytestmark = pytest.mark.cpu


class Constant:
    """Leaves the learning rate as it is."""

    def __init__(self, optimizer, model, **options):
        optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        self.level = [each.param_groups[0]["lr"] for each in optimizers]

    def loss(self, closure):
        return closure()

    def step(self):
        pass


@pytest.fixture
def numbers(capsys, monkeypatch):
    """What a pattern finds in the words of an example that runs with AutoLR, or at a constant rate."""

    def numbers(name, pattern, constant=False, **options):
        example = importlib.import_module(f"examples.{name}")
        with monkeypatch.context() as patch:
            if constant:
                patch.setattr(example, "AutoLR", Constant)
            example.main(**options)
        return [float(number) for number in re.search(pattern, capsys.readouterr().out).groups()]

    return numbers


@pytest.mark.parametrize("lr", [1e-6, 10.0])
def test_digits(lr, numbers):
    pattern = r"-> (\S+), test accuracy (\S+)%"
    level, found = numbers("digits", pattern, lr=lr)
    _, kept = numbers("digits", pattern, constant=True, lr=lr)
    assert 0.01 < level < 2
    assert found > 94
    assert kept < 50


def test_two_optimizers(numbers):
    pattern = r"-> (\S+), 1e-06 -> (\S+), test accuracy (\S+)%"
    of_muon, of_adamw, found = numbers("two_optimizers", pattern)
    *_, kept = numbers("two_optimizers", pattern, constant=True)
    assert of_muon == pytest.approx(10 * of_adamw, rel=1e-2)
    assert found > 94
    assert kept < 50


def test_gan(numbers):
    pattern = r"(\d) of 8 clouds drawn, (\d+)% "
    clouds, near = numbers("gan", pattern)
    assert clouds == 8
    assert near > 30


def test_fine_tuning_beats_training_from_scratch(numbers):
    tuned, scratch = numbers("finetuning", r"fine-tuning (\S+)%, without pretraining (\S+)%")
    assert tuned > 94
    assert tuned > scratch


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_learns_and_leaves_the_model_alone(numbers):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    pattern = r"down: loss (\S+), with adapters (\S+)\n.*up: loss (\S+), .* (\S+) again"
    down, adapted, up, again = numbers("lora", pattern)
    assert down > math.log(32)  # of guessing
    assert adapted < 0.4  # the lowest possible is log(3) / 11 = 0.1: the second number is one of three
    assert up == again < 0.4


def test_accumulation_beats_the_best_linear_filter(numbers):
    _, error = numbers("accumulation", r"test error (\S+) -> (\S+)")
    digits = load_digits(seed=0)
    train, clean = (split[0].flatten(start_dim=1) for split in (digits.train, digits.test))
    spoilt = clean + 0.3 * torch.randn_like(clean) - train.mean(dim=0)
    covariance = train.T.cov()
    wiener = torch.linalg.solve(covariance + 0.3**2 * torch.eye(64), covariance)
    assert error < (spoilt @ wiener + train.mean(dim=0) - clean).square().mean()


@pytest.mark.filterwarnings("ignore:the lr of optimizer:UserWarning")  # nothing of AutoLR is loaded at last
def test_resuming(numbers, monkeypatch):
    pattern = r"(\d) of (\d) weight tensors"
    same, of = numbers("resuming", pattern)
    assert same == of == 4
    monkeypatch.setattr("autolr_fast.AutoLR.load_state_dict", lambda scheduler, state: None)
    assert numbers("resuming", pattern)[0] < 4


def test_tree(numbers):
    *rates, accuracy = numbers("alr_tree", r"rates" + 5 * r" (\S+)," + r" test accuracy (\S+)%")
    assert rates[0] > 0.1 > rates[-1] > 1e-3  # of those that it starts from, 1 serves at first
    assert accuracy > 94


def test_every_example_is_in_the_table():
    folder = Path(__file__).parent.parent / "examples"
    listed = re.findall(r"\]\((\w+)\.py\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
