"""Lightning Fabric: the plain loop in mixed precision.

Run ``python -m examples.fabric``.
"""

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits, network


def main(epochs=6):
    """Train, and print the learning rate that was found and the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits(seed=0)
    fabric = Fabric(devices=1, precision="bf16-mixed")
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(*digits.train), batch_size=64, shuffle=True))
    scheduler = AutoLR(optimizer, model, total_steps=epochs * len(loader))

    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = scheduler.loss(lambda: F.cross_entropy(model(x), y))
            fabric.backward(loss)
            optimizer.step()
            scheduler.step()

    images, labels = fabric.to_device(digits.test)
    model.eval()
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == labels).double().mean().item()
    print(f"learning rate 1e-06 -> {scheduler.level[0]:.3g}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
