"""A convolutional network whose learning rate is searched by ALRTree while it trains.

    python -m examples.alr_tree                          # scikit-learn's digits, seconds
    python -m examples.alr_tree --data path/to/cifar10   # train-*.parquet and test-*.parquet
    torchrun --nproc-per-node 2 -m examples.alr_tree     # branches shared out to two processes

With ``--checkpoint`` it goes on where it was stopped, after the last epoch that ended.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import ALRTree
from autolr_fast.demo import load_digits
from benchmarks.paper.data import Batches, load_dataset


def main(argv=None):
    """Train, and print what each epoch found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of CIFAR-10 as parquet files; digits without it")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01], help="learning rates to start from")
    parser.add_argument("--beams", type=int, default=2, help="models that go on after an epoch")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, if it is there, and to save to")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0

    torch.manual_seed(0)
    (x, y), (test_x, test_y) = cifar(args.data) if args.data else digits()
    model = network(channels=x.shape[1], classes=int(y.max()) + 1)
    # A generator of their own: on every rank the batches come in the same order.
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(x, y), args.batch_size, shuffle=True, generator=order)
    momentum = {"momentum": 0.9}
    tree = ALRTree(model, F.cross_entropy, args.lr, beams=args.beams, optimizer_options=momentum, generator=order)
    if args.checkpoint and args.checkpoint.exists():
        tree.load_state_dict(torch.load(args.checkpoint, weights_only=True))

    def tell(epoch):
        if rank == 0:
            print(f"epoch {epoch.number}: learning rate {epoch.best.lr:.3g}, training loss {epoch.best.loss:.4f}, "
                  f"test accuracy {accuracy(model, test_x, test_y):.1%}", flush=True)  # fmt: skip
            if args.checkpoint:
                torch.save(tree.state_dict(), args.checkpoint)

    tree.fit(loader, args.epochs, tell)
    if dist.is_initialized():
        dist.destroy_process_group()


def network(channels, classes):
    """Three convolutions with BatchNorm, and a linear layer on their mean."""
    layers = []
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def digits():
    """Images [M, 1, 8, 8] and labels [M], to train on and to test with."""
    split = load_digits(seed=0)
    return split.train, split.test


def cifar(directory):
    """The same of images [M, 3, 32, 32]."""
    data = load_dataset(directory, cache=Path("build") / "data")
    normalize = Batches(data.train_images, data.train_labels, 1, seed=0, augment=False).normalize
    return (normalize(data.train_images), data.train_labels), (normalize(data.test_images), data.test_labels)


@torch.no_grad()
def accuracy(model, x, y):
    """Share of right answers; the tree trains in the modes that the model had at first."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in x.split(1000)]).eq(y).double().mean().item()


if __name__ == "__main__":
    main()
