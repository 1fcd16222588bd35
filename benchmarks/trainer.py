"""The Trainer of transformers with AutoLR from three rates, beside its linear schedule from five.

``python -m benchmarks.trainer --text FILE`` trains a small GPT-2 on the characters of a text, from scratch and as
fine-tuning, and writes ``results/trainer.md``; three minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from cpuinfo import get_cpu_info
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import autolr_fast
from autolr_fast.integrations.transformers import attach

from .report import RESULTS

__all__ = ["main"]

STARTS = (1e-6, 5e-5, 1.0)
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STEPS = {"from scratch": 300, "fine-tuning": 150}
LENGTH, BATCH = 32, 16


def main(argv: Sequence[str] | None = None) -> None:
    """Train all, and write the table.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text of at least 200,000 characters")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--steps", type=int, help="of each training, in place of those of each task")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = args.text.read_text(encoding="utf-8")[:200_000]
    letters = sorted(set(text) | set(text.upper()))
    plain, upper = (_tokens(each, letters) for each in (text, text.upper()))
    rows: dict[str, dict[str, list[float]]] = {task: {} for task in STEPS}
    seconds: dict[str, dict[str, list[float]]] = {task: {} for task in STEPS}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        fresh = _model(len(letters))
        taught = copy.deepcopy(fresh)
        _loss_after(taught, plain, steps=args.steps or STEPS["from scratch"], rate=1e-2, seed=seed)
        for task, start, tokens in (("from scratch", fresh, plain), ("fine-tuning", taught, upper)):
            for name, rate, prepare in _runs():
                began = time.process_time()
                options = {"steps": args.steps or STEPS[task], "rate": rate, "seed": seed, "prepare": prepare}
                loss = _loss_after(copy.deepcopy(start), tokens, **options)
                seconds[task].setdefault(name.split(",")[0], []).append(time.process_time() - began)
                rows[task].setdefault(name, []).append(loss)
                print(f"seed {seed}, {task}, {name}: {loss:.3f}", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "trainer.md").write_text(_page(rows, seconds, args), encoding="utf-8")


def _runs() -> list[tuple[str, float, Callable[[Any], None] | None]]:
    """Return the name, the first rate, and what is done to the trainer, of each training."""
    ours = [(f"AutoLR, from {rate:g}", rate, attach) for rate in STARTS]
    return [*ours, *((f"linear, from {rate:g}", rate, None) for rate in GRID)]


def _model(letters: int) -> GPT2LMHeadModel:
    size = {"n_positions": LENGTH, "n_embd": 48, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=letters, bos_token_id=0, eos_token_id=0, **size))
    model.loss_type = "ForCausalLM"
    return model


def _tokens(text: str, letters: Sequence[str]) -> Tensor:
    """Return a text as windows [M, LENGTH] of the indices of its letters."""
    index = {letter: number for number, letter in enumerate(letters)}
    tokens = torch.tensor([index[letter] for letter in text])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def _loss_after(
    model: GPT2LMHeadModel,
    tokens: Tensor,
    *,
    steps: int,
    rate: float,
    seed: int,
    prepare: Callable[[Any], None] | None = None,
) -> float:
    """Train on nine tenths of the windows, and return the loss on 512 of the last tenth."""
    windows = [{"input_ids": window, "labels": window} for window in tokens]
    split = len(windows) * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=128,
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=windows[:split], eval_dataset=windows[split : split + 512])
        if prepare is not None:
            prepare(trainer)
        trainer.train()
        loss: float = trainer.evaluate()["eval_loss"]
    return loss


def _page(
    rows: dict[str, dict[str, list[float]]], seconds: dict[str, dict[str, list[float]]], args: argparse.Namespace
) -> str:
    """Return the results as Markdown."""
    cpu = get_cpu_info()
    versions = f"autolr_fast {autolr_fast.__version__}, torch {torch.__version__}"
    lines = [
        "# The Trainer of transformers, with AutoLR and with a linear schedule",
        "",
        f"- command: `python -m benchmarks.trainer --text {args.text.name}`",
        f"- date: {datetime.datetime.now(datetime.timezone.utc).date().isoformat()}",
        f"- machine: {cpu['brand_raw']}, {cpu['count']} cores, 1 thread",
        f"- versions: {versions}, transformers {transformers.__version__}, Python {platform.python_version()}",
        f"- seeds: 0 to {args.seeds - 1}",
        "",
        "A GPT-2 of two layers and 48 units, on 32 characters a text, 16 texts a step, AdamW. Fine-tuning begins",
        "at the end of a training from scratch, and its text is in capitals. The loss is that of 512 texts not",
        "trained on, mean ± standard error over seeds.",
        "",
    ]
    for task, of_task in rows.items():
        best = min((name for name in of_task if name.startswith("linear")), key=lambda name: _mean(of_task[name]))
        lines += [f"## {task.capitalize()}, {args.steps or STEPS[task]} steps", ""]
        lines += ["| | validation loss | beside the best linear |", "|---|---|---|"]
        for name, losses in of_task.items():
            over = _mean(losses) / _mean(of_task[best]) - 1
            lines.append(f"| {name}{' (best)' * (name == best)} | {_told(losses)} | {over:+.1%} |")
        ours, linear = (statistics.median(seconds[task][name]) for name in ("AutoLR", "linear"))
        lines += [
            "",
            f"Median CPU time of a training and its evaluation: AutoLR {ours / linear:.2f} times linear.",
            "",
        ]
    return "\n".join(lines)


def _mean(losses: Sequence[float]) -> float:
    """Return the mean; of losses that are no numbers, infinity."""
    mean = statistics.fmean(losses)
    return math.inf if math.isnan(mean) else mean


def _told(losses: Sequence[float]) -> str:
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
    return f"{_mean(losses):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
