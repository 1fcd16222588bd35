"""Muon for the matrices of a network, AdamW for the rest, one AutoLR: ``python -m examples.two_optimizers``."""

import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits


def main(steps=200):
    """Train on scikit-learn's digits, and print how well it went."""
    torch.manual_seed(0)
    (images, labels), _, (test_x, test_y) = load_digits(seed=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-5)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-5)
    scheduler = AutoLR([muon, adamw], model, total_steps=steps)
    for i in torch.randint(len(labels), (steps, 64)):
        model.zero_grad()
        scheduler.loss(lambda: F.cross_entropy(model(images[i]), labels[i])).backward()
        muon.step()
        adamw.step()
        scheduler.step()  # once, after both have stepped
    correct = model.eval()(test_x).argmax(1).eq(test_y).double().mean().item()
    print(f"level {scheduler.level[0]:.3g}, test accuracy {correct:.1%}")


if __name__ == "__main__":
    main()
