"""A denoising network whose steps add up noisy micro-batches: ``python -m examples.accumulation``."""

import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits


def main(steps=150, parts=4):
    """Learn to take noise off scikit-learn's digits, and print what the last probe saw."""
    torch.manual_seed(0)
    images = load_digits(seed=0).train[0].flatten(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scheduler = AutoLR(optimizer, model, total_steps=steps, micro_batches="all")
    for _ in range(steps):
        optimizer.zero_grad()
        for x in images[torch.randint(len(images), (64,))].chunk(parts):
            # A probe runs all of them again, each on its own x, noise and dropout masks.
            loss = scheduler.loss(lambda: F.mse_loss(model(x + 0.3 * torch.randn_like(x)), x))
            (loss / parts).backward()
        optimizer.step()
        scheduler.step()
    print(f"loss {loss.item():.4f}, {scheduler.last_probe}")


if __name__ == "__main__":
    main()
