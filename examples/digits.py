"""A plain training loop in which AutoLR finds the learning rate, from a start that is far too low.

Run ``python -m examples.digits``. A small network learns scikit-learn's handwritten digits.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits


def main(lr=1e-6, epochs=10):
    """Train from any learning rate, and print the one found and the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits(seed=0)
    loader = DataLoader(TensorDataset(*digits.train), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = AutoLR(optimizer, model, total_steps=epochs * len(loader))

    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = scheduler.loss(lambda: F.cross_entropy(model(x), y))  # the one changed line
            loss.backward()
            optimizer.step()
            scheduler.step()  # after every step of the optimizer, not once an epoch

    images, labels = digits.test
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == labels).double().mean().item()
    print(f"learning rate {lr:.3g} -> {scheduler.level[0]:.3g}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
