"""A LightningModule whose learning rate AutoLR finds: ``python -m examples.lightning_callback``."""

import lightning.pytorch as pl
import torch

from autolr_fast.demo import load_digits, network
from autolr_fast.integrations.lightning import AutoLRCallback


class Classifier(pl.LightningModule):  # noqa: D101
    def training_step(self, batch, _):  # noqa: D102
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):  # noqa: D102
        return torch.optim.SGD(self.parameters(), lr=1e-6, momentum=0.9)  # the optimizer alone


def main():
    """Train on scikit-learn's digits, and print how well it went."""
    train, _, (x, y) = load_digits(seed=0)
    module, callback = Classifier(), AutoLRCallback()
    module.network = network()
    loader = torch.utils.data.DataLoader(list(zip(*train, strict=True)), batch_size=64, shuffle=True)
    pl.Trainer(max_epochs=6, callbacks=[callback], logger=False, enable_checkpointing=False).fit(module, loader)
    correct = module.eval().network(x).argmax(1).eq(y).double().mean().item()
    print(f"level {callback.scheduler.level[0]:.3g}, test accuracy {correct:.1%}")


if __name__ == "__main__":
    main()
