"""Lightning Fabric: AutoLR in a plain loop, as ever: ``python -m examples.fabric``."""

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits, network


def main(epochs=6):
    """Train on scikit-learn's digits, and print how well it went."""
    train, _, (test_x, test_y) = load_digits(seed=0)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = network()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(*train), batch_size=64, shuffle=True))
    scheduler = AutoLR(optimizer, model, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(scheduler.loss(lambda: torch.nn.functional.cross_entropy(model(x), y)))
            optimizer.step()
            scheduler.step()
    correct = model.eval()(test_x).argmax(1).eq(test_y).double().mean().item()
    print(f"level {scheduler.level[0]:.3g}, test accuracy {correct:.1%}")


if __name__ == "__main__":
    main()
