"""A tiny GPT-2 learns to count with the Trainer of transformers: ``python -m examples.trainer``."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from autolr_fast.integrations.transformers import attach


def main(steps=100):
    """Train from a rate far too low, and print the level that AutoLR found and the last loss."""
    torch.manual_seed(0)
    numbers = (torch.randint(32, (512, 1)) + torch.randint(1, 4, (512, 1)) * torch.arange(12)) % 32
    rows = [{"input_ids": row, "labels": row} for row in numbers]
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=12, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=steps, learning_rate=1e-7, logging_steps=10, report_to="none")
        trainer = Trainer(model, args, train_dataset=rows)
        attach(trainer)  # the one line
        trainer.train()
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    print(f"level {last['autolr/level']:.3g}, loss {last['loss']:.3f}")


if __name__ == "__main__":
    main()
