"""Two optimizers and one AutoLR: Muon trains the matrices of a network, AdamW the rest.

Run ``python -m examples.two_optimizers``.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits


def main(epochs=12):
    """Train on scikit-learn's digits, and print the learning rates that were found and the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits(seed=0)
    loader = DataLoader(TensorDataset(*digits.train), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-5)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-6)
    scheduler = AutoLR([muon, adamw], model, total_steps=epochs * len(loader))  # the rates keep their ratio

    for _ in range(epochs):
        for x, y in loader:
            model.zero_grad()
            loss = scheduler.loss(lambda: F.cross_entropy(model(x), y))
            loss.backward()
            muon.step()
            adamw.step()
            scheduler.step()  # once, after both have stepped

    images, labels = digits.test
    model.eval()
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == labels).double().mean().item()
    of_muon, of_adamw = scheduler.level
    print(f"learning rates 1e-05 -> {of_muon:.3g}, 1e-06 -> {of_adamw:.3g}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
