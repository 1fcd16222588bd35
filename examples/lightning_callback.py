"""Lightning: a callback finds the learning rate of a LightningModule.

Run ``python -m examples.lightning_callback``.
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast.demo import load_digits, network
from autolr_fast.integrations.lightning import AutoLRCallback


class Classifier(pl.LightningModule):
    """Classifies scikit-learn's handwritten digits."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, batch_idx):
        """Return the loss of a batch."""
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        """Return the optimizer alone: AutoLR is the scheduler."""
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)


def main():
    """Train, and print the learning rate that was found and the test accuracy."""
    pl.seed_everything(0, verbose=False)
    digits = load_digits(seed=0)
    loader = DataLoader(TensorDataset(*digits.train), batch_size=64, shuffle=True)
    module, callback = Classifier(), AutoLRCallback()
    trainer = pl.Trainer(max_epochs=6, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)

    images, labels = digits.test
    module.eval()
    with torch.no_grad():
        accuracy = (module.network(images).argmax(dim=1) == labels).double().mean().item()
    print(f"learning rate 1e-06 -> {callback.scheduler.level[0]:.3g}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
