"""Hugging Face Accelerate: one loop for one process or several, with two micro-batches to a step.

Run ``accelerate launch -m examples.accelerate_loop`` on GPUs. Two processes on the CPU need
``ACCELERATE_USE_CPU=1 torchrun --standalone --nproc-per-node 2 -m examples.accelerate_loop``.
AutoLR averages the losses of all processes, so every process has the same learning rate.
"""

import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits


def main(epochs=20, parts=2):
    """Train, and print the learning rate of each process and the test accuracy."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=parts)
    digits = load_digits(seed=0)
    loader = DataLoader(TensorDataset(*digits.train), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_an_epoch = math.ceil(len(loader) / parts)  # the prepared loader has the batches of one process
    scheduler = AutoLR(optimizer, model, total_steps=epochs * steps_an_epoch)

    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = scheduler.loss(lambda: F.cross_entropy(model(x), y))
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    rates = accelerator.gather(torch.tensor(scheduler.level, device=accelerator.device)).tolist()
    images, labels = (each.to(accelerator.device) for each in digits.test)
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == labels).double().mean().item()
    accelerator.print(f"learning rate of each process: {rates}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
