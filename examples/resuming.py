"""Resuming: a training that was interrupted goes on, and ends with the same weights bit for bit.

Run ``python -m examples.resuming``. Random numbers are in the checkpoint too.
"""

import contextlib
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits


def main():
    """Train once in one go, once with an interruption, and print whether the weights are the same."""
    with tempfile.TemporaryDirectory() as folder:
        whole = train(Path(folder) / "whole.pt")
        with contextlib.suppress(KeyboardInterrupt):
            train(Path(folder) / "parts.pt", interrupted_at=40)
        resumed = train(Path(folder) / "parts.pt")
    pairs = list(zip(whole.parameters(), resumed.parameters(), strict=True))
    same = sum(torch.equal(one, other) for one, other in pairs)
    print(f"interrupted and resumed: {same} of {len(pairs)} weight tensors are the same bit for bit")


def train(checkpoint, epochs=6, interrupted_at=None):
    """Train from the checkpoint if there is one, and save a checkpoint after every epoch."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*load_digits(seed=0).train), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scheduler = AutoLR(optimizer, model, total_steps=epochs * len(loader))
    parts, epochs_done = {"model": model, "optimizer": optimizer, "scheduler": scheduler}, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])  # a GPU has another: torch.cuda.set_rng_state
        epochs_done = saved["epochs_done"]

    for epoch in range(epochs_done, epochs):
        for x, y in loader:
            if scheduler.last_epoch == interrupted_at:
                raise KeyboardInterrupt  # as Ctrl+C does
            optimizer.zero_grad()
            scheduler.loss(lambda: F.cross_entropy(model(x), y)).backward()
            optimizer.step()
            scheduler.step()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "random": torch.get_rng_state(), "epochs_done": epoch + 1}, checkpoint)
    return model


if __name__ == "__main__":
    main()
