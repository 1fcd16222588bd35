"""Hugging Face Trainer: a tiny GPT-2 learns to count, and AutoLR finds the learning rate.

Run ``python -m examples.trainer``.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from autolr_fast.integrations.transformers import attach

NUMBERS, LENGTH = 32, 12


def main(steps=150):
    """Train, and print the learning rate that was found and the loss."""
    torch.manual_seed(0)
    sizes = {"vocab_size": NUMBERS, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, learning_rate=1e-6, logging_steps=30, save_strategy="no", report_to="none"
        )
        trainer = Trainer(model, args, train_dataset=counting(rows=512))
        attach(trainer)  # the one line
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"learning rate 1e-06 -> {trainer.lr_scheduler.level[0]:.3g}, loss {losses[0]:.2f} -> {losses[-1]:.2f}")


def counting(rows):
    """Return rows of numbers that go up by one, two or three."""
    first, by = torch.randint(NUMBERS, (rows, 1)), torch.randint(1, 4, (rows, 1))
    numbers = (first + by * torch.arange(LENGTH)) % NUMBERS
    return [{"input_ids": row, "labels": row} for row in numbers]


if __name__ == "__main__":
    main()
