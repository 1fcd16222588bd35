"""Where lines of candidates settle, over how many steps they go, and why the level may run away.

``python -m benchmarks.study.windows`` writes ``results/study/windows.png`` in about two minutes. Its panels (h is
the largest curvature where there are many):

1. SGD on a quadratic of many curvatures, without noise, after ten steps. Near a rate of 2 / h, steps cross the
   steepest valley and back, each nearly as long as the one before, while along the others there is still far to
   go. The line over one step, or three, sees the last crossing and asks for less, here from 1.8 / h on. Over two or
   four the crossings cancel: what is left is the progress, and they ask for more up to 2 / h, where the training
   diverges.
2. The same on a network, by AutoLR with its guard and without annealing: the rate times the sharpness over 2,
   which is 1 where a quadratic begins to diverge. The median of 5 measurements, as in the next.
3. The same on a network with BatchNorm, unguarded.
4. SGD on a noisy quadratic, loss ``h (x - c)^2 / 2`` with a new c for each batch. The best scale of the line over
   the last w steps, judged on the last batch, is 1 where the rate is 1 / h, for every w: all settle at one place.
5. With momentum 0.9 a longer line settles at a lower rate. That over two steps does so at (1 - momentum) / h, where
   the steps are in the long run as long as SGD's at 1 / h; that over one step at three and a half times as much,
   that over three at half as much. Adam's first moment is such a momentum, with 1 - momentum times the rate.
6. AutoLR itself on such a quadratic of many curvatures (dashed), and on the same loss of ``x / |x|``, as of weights
   before a normalisation. There a step is orthogonal to x and makes it longer, and the longer x is, the less a
   rate moves it: the level follows the length that follows the level, up to ``max_lr``. A longer line is only
   slower; so is the guard, which noise passes now and then.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from autolr_fast import AutoLR, Rule

from .slices import RESULTS
from .tasks import TASKS, Places, batch, load

_WINDOWS: dict[str, int | tuple[int, ...]] = {"1": 1, "2": 2, "1 and 2": (1, 2), "4": 4}
_COLOURS = {"1": "#d55e00", "2": "#0072b2", "1 and 2": "#009e73", "3": "#e69f00", "4": "#cc79a7"}
_COMMAND = "python -m benchmarks.study.windows"


class Quadratic(nn.Module):
    """A loss with 50 curvatures from 1 to 1/1000, of a vector or of its direction alone.

    Args:
        normalized: whether of its direction.
    """

    def __init__(self, normalized: bool):
        super().__init__()
        self.x = nn.Parameter(torch.randn(50) / math.sqrt(50))
        self.normalized = normalized
        self.curvatures: Tensor
        self.register_buffer("curvatures", torch.logspace(0, -3, 50))

    def forward(self, target: Tensor) -> Tensor:
        """Return the loss, where ``target`` [50] would be the best vector."""
        x = self.x / self.x.norm() if self.normalized else self.x
        return (self.curvatures * (x - target).square()).sum() / 2


def best_scale(rate: float, window: int, momentum: float = 0.0, count: int = 100_000) -> float:
    """Return the best scale of the line over the last steps on a noisy quadratic of curvature 1, by simulation.

    Args:
        rate: learning rate.
        window: steps that the line spans.
        momentum: of SGD.
        count: independent runs that are averaged.
    """
    generator = torch.Generator().manual_seed(0)
    x, velocity = torch.zeros(count), torch.zeros(count)
    history = [x]
    for _ in range(max(100, int(5 / rate))):
        c = torch.randn(count, generator=generator)
        velocity = momentum * velocity + (x - c)
        x = x - rate * velocity
        history = [*history[-window:], x]
    direction, start = history[-1] - history[0], history[0]
    return ((direction * (c - start)).mean() / direction.square().mean()).item()


def best_scale_without_noise(rate: float, window: int, steps: int = 10) -> float:
    """Return the best scale of the line over the last steps of SGD on a quadratic of many curvatures.

    Args:
        rate: learning rate, times the largest curvature.
        window: steps that the line spans.
        steps: from the start, where all directions are alike.
    """
    curvatures = Quadratic(normalized=False).curvatures.double()
    start, end = ((1 - rate * curvatures) ** count for count in (steps - window, steps))
    direction = end - start
    return (-(curvatures * direction * start).sum() / (curvatures * direction.square()).sum()).item()


def levels(normalized: bool, window: int | tuple[int, ...], steps: int = 1500, guard: int = 0) -> list[float]:
    """Return the learning rate at each step of SGD under AutoLR, unguarded unless told, on the quadratic."""
    torch.manual_seed(0)
    model = Quadratic(normalized)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoLR(
        optimizer,
        model,
        rule=Rule(window_steps=window),
        probe_every_steps=5,
        guard_probes=guard,
        evaluator="inplace",
    )
    best, lrs = torch.randn(50) / math.sqrt(50), []
    for _ in range(steps):
        closure = partial(model, best + 0.05 * torch.randn(50))
        optimizer.zero_grad()
        scheduler.loss(closure).backward()
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    return lrs


def edges(name: str, window: int | tuple[int, ...], steps: int, guard: int, every: int = 10) -> list[float]:
    """Return lr * sharpness / 2 at every tenth step of SGD under AutoLR without annealing.

    Args:
        name: of a task whose data are made.
        window: of AutoLR.
        steps: how many.
        guard: of AutoLR.
        every: steps from one measurement to the next.
    """
    task, data = TASKS[name], load(name, Places(None, Path("nowhere"), None))
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = AutoLR(optimizer, model, rule=Rule(window_steps=window), guard_probes=guard, evaluator="inplace")
    found = []
    for step in range(steps):
        x, y = batch(data, step, task.batch_size, seed=0)
        closure = partial(task.loss, model, x, y)
        optimizer.zero_grad()
        scheduler.loss(closure).backward()
        optimizer.step()
        scheduler.step()
        if step % every == every - 1:
            x, y = batch(data, 0, 256, seed=1)
            found.append(optimizer.param_groups[0]["lr"] * sharpness(model, task.loss(model, x, y)) / 2)
    return found


def sharpness(model: nn.Module, loss: Tensor, rounds: int = 20) -> float:
    """Return the largest curvature of a loss in the parameters, by power iteration."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    vector = [torch.randn_like(parameter) for parameter in parameters]
    value = 0.0
    for _ in range(rounds):
        norm = math.sqrt(sum(part.square().sum().item() for part in vector))
        vector = [part / norm for part in vector]
        product = torch.autograd.grad(gradient, parameters, grad_outputs=vector, retain_graph=True)
        value = sum((a * b).sum().item() for a, b in zip(vector, product, strict=True))
        vector = [part.detach() for part in product]
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Args:
        argv: the arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Draw what the windows do.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the picture (%(default)s)")
    args = parser.parse_args(argv)
    figure = Figure(figsize=(14, 8), layout="constrained")
    (crossing, regression, network), (*settling, quadratics) = figure.subplots(2, 3)
    steep = [0.8 + 0.01 * i for i in range(131)]
    for window in (1, 2, 3, 4):
        scales = [best_scale_without_noise(rate, window) for rate in steep]
        crossing.plot(steep, scales, color=_COLOURS[str(window)], label=f"over {window}")
    crossing.axhline(1.0, color="0.5", linewidth=1)
    _log(crossing, "learning rate x largest curvature", "best scale", "quadratic without noise, SGD", x="linear")
    crossing.set_ylim(0.3, 30)
    for window in (1, 2, 3):
        _draw_edges(regression, str(window), edges("friedman", window, steps=500, guard=10))
    _log(regression, "step", "learning rate x sharpness / 2", "regression, SGD", x="linear")
    rates = [0.02 * 1.35**i for i in range(15)]
    for axes, momentum in zip(settling, (0.0, 0.9), strict=True):
        for window in (1, 2, 3, 4):
            scales = [best_scale(rate, window, momentum) for rate in rates]
            axes.plot(rates, scales, color=_COLOURS[str(window)], label=f"over {window}")
        axes.axhline(1.0, color="0.5", linewidth=1)
        _log(axes, "learning rate x curvature", "best scale", f"noisy quadratic, momentum {momentum:g}")
    for name, window in _WINDOWS.items():
        quadratics.plot(levels(False, window), color=_COLOURS[name], linestyle="--", linewidth=0.8)
        quadratics.plot(levels(True, window), color=_COLOURS[name], label=f"over {name}", linewidth=1)
        _draw_edges(network, name, edges("digits", window, steps=TASKS["digits"].steps, guard=0))
    quadratics.plot(levels(True, 2, guard=10), color="#111111", label="over 2, guarded")
    _log(quadratics, "step", "learning rate", "AutoLR on quadratics of x (dashed) and x / |x|", x="linear")
    _log(network, "step", "learning rate x sharpness / 2", "digits, network with BatchNorm, SGD", x="linear")
    figure.supxlabel(f"{_COMMAND}   (torch {torch.__version__}, seed 0)", fontsize=7, color="0.4")
    args.results.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.results / "windows.png", dpi=110)
    print(f"wrote {args.results / 'windows.png'}")


def _draw_edges(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Draw the median of five measurements."""
    medians = [statistics.median(values[max(0, i - 2) : i + 3]) for i in range(len(values))]
    axes.plot([10 * (i + 1) for i in range(len(values))], medians, color=_COLOURS[name], label=f"over {name}")
    axes.axhline(1.0, color="0.5", linewidth=1)


def _log(axes: Axes, xlabel: str, ylabel: str, title: str, x: str = "log") -> None:
    axes.set_xscale(x)
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
