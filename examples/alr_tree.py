"""ALRTree: branches of a model train at several learning rates at once, and the best ones go on.

Run ``python -m examples.alr_tree``. The search costs as many trainings as there are branches: nine in the first
epoch, and six in each later one.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import ALRTree
from autolr_fast.demo import load_digits


def main(epochs=5):
    """Search, and print the best learning rate of each epoch and the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits(seed=0)
    loader = DataLoader(TensorDataset(*digits.train), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    tree = ALRTree(model, F.cross_entropy, lr=[1e-4, 1e-2, 1.0], beams=2, optimizer_options={"momentum": 0.9})
    tree.fit(loader, epochs)

    images, labels = digits.test
    model = tree.best_model()
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == labels).double().mean().item()
    rates = ", ".join(f"{epoch.best.lr:.3g}" for epoch in tree.history)
    print(f"best learning rates {rates}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
