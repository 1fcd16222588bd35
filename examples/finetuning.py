"""Fine-tuning: a network that knows the digits 0 to 4 learns the digits 5 to 9 in 30 steps.

Run ``python -m examples.finetuning``. A network that knows nothing takes the same 30 steps, for comparison. Nobody
knows a rate for these digits: AutoLR searches. Where you know one, give it with ``calibration_steps=0``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import AutoLR
from autolr_fast.demo import load_digits, network


def main():
    """Pretrain, fine-tune, and print the test accuracy with and without pretraining."""
    torch.manual_seed(0)
    digits = load_digits(seed=0)
    model = network()
    train(model, digits_between(0, 4, digits.train), steps=150)

    accuracies = []
    for start in (model, network()):
        learner = nn.Sequential(*start[:-1], nn.Linear(64, 5))  # a new head for the new classes
        train(learner, digits_between(5, 9, digits.train), steps=30)
        accuracies.append(accuracy(learner, *digits_between(5, 9, digits.test)))
    print("test accuracy after fine-tuning {:.1%}, without pretraining {:.1%}".format(*accuracies))


def digits_between(first, last, split):
    """Return the images of these digits, and labels that count from 0."""
    images, labels = split
    chosen = (labels >= first) & (labels <= last)
    return images[chosen], labels[chosen] - first


def train(model, data, steps):
    """Train all of the model; each training has its own AutoLR, which finds its own rate."""
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scheduler = AutoLR(optimizer, model, total_steps=steps)
    model.train()
    for batch in torch.randint(len(labels), (steps, 64)):
        optimizer.zero_grad()
        loss = scheduler.loss(lambda: F.cross_entropy(model(images[batch]), labels[batch]))
        loss.backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def accuracy(model, images, labels):
    """Return the share of right answers."""
    model.eval()
    return (model(images).argmax(dim=1) == labels).double().mean().item()


if __name__ == "__main__":
    main()
