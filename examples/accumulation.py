"""Gradient accumulation: each step of a denoising network adds up four noisy micro-batches.

Run ``python -m examples.accumulation``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits

NOISE = 0.3


def main(steps=300, parts=4):
    """Train on scikit-learn's digits, and print by how much the network lowers the noise of test images."""
    torch.manual_seed(0)
    digits = load_digits(seed=0)
    images = digits.train[0].flatten(start_dim=1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    # A probe runs all micro-batches of a step again, each with its own noise and dropout masks.
    scheduler = AutoLR(optimizer, model, total_steps=steps, micro_batches="all")

    for _ in range(steps):
        optimizer.zero_grad()
        batch = images[torch.randint(len(images), (64,))]
        for x in batch.chunk(parts):
            loss = scheduler.loss(lambda: F.mse_loss(model(noisy(x)), x))
            (loss / parts).backward()  # outside the closure: AutoLR sees the whole loss
        optimizer.step()
        scheduler.step()

    clean = digits.test[0].flatten(start_dim=1)
    spoilt = noisy(clean)
    model.eval()
    with torch.no_grad():
        errors = F.mse_loss(spoilt, clean), F.mse_loss(model(spoilt), clean)
    print("learning rate 1e-06 -> {:.3g}, test error {:.4f} -> {:.4f}".format(scheduler.level[0], *errors))


def noisy(images):
    """Return the images with noise on them."""
    return images + NOISE * torch.randn_like(images)


if __name__ == "__main__":
    main()
