"""A loop of Hugging Face Accelerate: ``accelerate launch -m examples.accelerate_loop``, or ``python -m``."""

from accelerate import Accelerator
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits


def main(epochs=8, parts=2):
    """Learn scikit-learn's digits by steps of two micro-batches, and print what the last probe saw."""
    accelerator = Accelerator(gradient_accumulation_steps=parts)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = optim.AdamW(model.parameters())
    loader = DataLoader(TensorDataset(*load_digits(seed=0).train), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = accelerator.prepare(AutoLR(optimizer, model, total_steps=epochs * -(-len(loader) // parts)))
    for x, y in (batch for _ in range(epochs) for batch in loader):
        with accelerator.accumulate(model):
            loss = scheduler.loss(lambda: nn.functional.cross_entropy(model(x), y))
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.4f}, {scheduler.last_probe}")


if __name__ == "__main__":
    main()
