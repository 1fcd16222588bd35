"""Models, batches and the independent loops that the tests compare with."""

import copy
import math
import random
import warnings

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast._evaluators import EVALUATORS, EvaluatorError, resolve_evaluator

MEAN_AT = 2 / 3  # of the way to where the last step began from where one ten steps before did
NAMED = sorted(set(EVALUATORS) - {"auto"})  # which is "inplace" for few candidates

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.01, "maximize": True}),
    "sgd-fused": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam-foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "adam-fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "rmsprop-foreach": (torch.optim.RMSprop, {"lr": 0.01, "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adagrad-fused": (torch.optim.Adagrad, {"lr": 0.05, "fused": True}),
}


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.embedding(x).mean(1))


class Recurrent(nn.Module):
    """vmap has no rule for its LSTM."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class KeepsWeights(nn.Module):
    """Keeps a second reference to its weight, out of functional_call's reach: batched, it is silently wrong."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.kept = [self.inner.weight]

    def forward(self, x):
        return F.linear(x, self.kept[0], self.inner.bias)


class UpdatesBuffer(nn.Module):
    """Its buffer enters the loss and is replaced at every forward, as in spectral norm."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        self.scale = self.scale * 0.5 + self.inner(x).detach().mean(0)
        return self.inner(x) * self.scale


def mlp():
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def convnet(dropout=0.3):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * 16, 3),
    )  # fmt: skip


def frozen_mlp():
    model = mlp()
    model[0].requires_grad_(False)
    return model


def transformer(dropout=0.0):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(32, 3))


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Linear(8, 3))


def vectors():
    return torch.randn(12, 5)


# name -> (model, input)
MODELS = {
    "mlp": (mlp, vectors),
    "convnet": (convnet, lambda: torch.randn(12, 2, 4, 4)),
    "frozen": (frozen_mlp, vectors),
    "tied": (Tied, lambda: torch.randint(11, (12, 4))),
    "transformer": (transformer, lambda: torch.randn(12, 4, 8)),
    "updates-buffer": (UpdatesBuffer, vectors),
    "spectral-norm": (spectral, vectors),
    "attention-dropout": (lambda: transformer(0.1), lambda: torch.randn(12, 4, 8)),
    "channels-last": (
        lambda: convnet().to(memory_format=torch.channels_last),
        lambda: torch.randn(12, 2, 4, 4).to(memory_format=torch.channels_last),
    ),
}

ON_GPU = torch.get_default_device().type == "cuda"  # by --device
# vmap has no rule for an operation of the first, nor for the kernels of the second on a GPU.
UNBATCHED = {"spectral-norm"} | ({"attention-dropout"} if ON_GPU else set())


def seeded(make, inputs, count):
    """A model, its input and as many targets: the same numbers on every device."""
    torch.manual_seed(1)
    with torch.device("cpu"):
        parts = make(), inputs(), torch.randint(3, (count,))
    return [part.to(torch.get_default_device()) for part in parts]


def problem(name):
    """A seeded model, and a closure maker: ``loss_of(model)`` is its loss on one fixed batch."""
    model, x, y = seeded(*MODELS[name], 12)
    return model, lambda model: F.cross_entropy(model(x), y)


def sgd(model, lr=0.1, **kwargs):
    return torch.optim.SGD(model.parameters(), lr=lr, **kwargs)


def of_each_rank(worker, directory, *more, ranks=2):
    """What each of the processes saved as ``result{rank}.pt`` in a directory."""
    torch.multiprocessing.spawn(worker, (str(directory), *more), nprocs=ranks)
    return [torch.load(directory / f"result{rank}.pt", weights_only=True) for rank in range(ranks)]


def train_step(model, optimizer, loss_of):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def between(prev, now, factor):
    """prev + factor * (now - prev) from the nearer end, in float32 or wider, each operation rounded."""
    wide = torch.promote_types(now.dtype, torch.float32)
    step = now.to(wide) - prev.to(wide)
    if abs(factor) < 0.5:
        return (prev.to(wide) + factor * step).to(now.dtype)
    return (now.to(wide) - (1 - factor) * step).to(now.dtype)


def losses_of_copies(model, prev, factors, loss_of):
    """The loop over deep copies: each candidate in a copy of its own, with the same random numbers."""
    losses = []
    for factor in factors:
        candidate = copy.deepcopy(model)
        with torch.no_grad(), torch.random.fork_rng():
            for name, parameter in candidate.named_parameters():
                if name in prev:
                    parameter.copy_(between(prev[name], parameter, factor))
            losses.append(loss_of(candidate).item())
    return losses


def random_states():
    """Where all random-number streams are."""
    states = [random.getstate(), numpy.random.get_state(), torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if ON_GPU else states


def set_random_states(states):
    """Put all random-number streams where they were."""
    setters = [random.setstate, numpy.random.set_state, torch.set_rng_state, torch.cuda.set_rng_state]
    for setter, state in zip(setters, states, strict=False):
        setter(state)


def from_states(states, loss_of):
    """``loss_of`` with its random numbers from where the streams were; afterwards they are where they are now."""

    def loss_from_there(model):
        now = random_states()
        set_random_states(states)
        try:
            return loss_of(model)
        finally:
            set_random_states(now)

    return loss_from_there


def raise_rate(scheduler, times):
    """Take the next step at a rate that is far too high; the level stays."""
    level = scheduler._level.value.clone()
    scheduler._level.start_at(times * level)
    scheduler._level.apply(scheduler.last_epoch)
    scheduler._level.start_at(level)


def moved_by_heat(asked, heats, state, limit):
    """Return by how much the level moves where the last step asks for a factor.

    Args:
        asked: that factor.
        heats: the last ones, the newest last; not a number where there is none.
        state: of what knows them: the means of the losses, those of step s weighed as s and as s cubed; the largest
            gain so far; whether the second mean is at its lowest.
        limit: of the heat, in units of the gain.
    """
    highest = math.inf if state["is_lowest"] else 1.0
    means, known = state["means"], sorted(heat for heat in heats if not math.isnan(heat))
    if math.isinf(limit):
        return asked
    if len(known) < 3 or not all(map(math.isfinite, means)):
        return min(asked, highest)
    heat = known[len(known) // 2]
    gain = max(4 * math.log(2) * (means[0] - means[1]), state["most"] / 10)
    times = 0.0 if heat <= 0 else math.inf if gain <= 0 else heat / (limit * gain)
    if times > 1:
        return min(asked, max(times**-0.5, 1 / 1.5))
    if asked > 1:
        return min(highest, 1.5 if times == 0 else min(times**-0.25, 1.5))
    return asked


def everything(model, optimizer):
    """All that a probe must not touch, as one comparable list of tensors."""
    state = [*model.parameters(), *model.buffers(), torch.get_rng_state()]
    if torch.cuda.is_available():
        state.append(torch.cuda.get_rng_state())
    state += [p.grad for p in model.parameters() if p.grad is not None]
    for entry in optimizer.state.values():
        state += [value for value in entry.values() if isinstance(value, torch.Tensor)]
    parts = [(t._indices(), t._values()) if t.is_sparse else (t,) for t in state]
    return [tensor.detach().clone() for some in parts for tensor in some]


def assert_same(before, after):
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


def refusal_of(name, *, model, optimizer, line, loss_of, expected, rtol=1e-4, exact=True):
    """Why the evaluator of that name refuses the model; None if its losses are the expected ones.

    ``expected`` is factor -> loss. Candidates that are evaluated alone are right bitwise (if ``exact``), batched
    ones to rounding. Nothing changes either way.
    """
    evaluator = resolve_evaluator(name)
    before = everything(model, optimizer)
    losses = reason = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # a model may warn of itself
        try:
            losses = evaluator.losses(model, line, list(expected), lambda: loss_of(model)).double().tolist()
        except EvaluatorError as error:
            reason = error.reason
    assert_same(before, everything(model, optimizer))
    assert not any(str(warning.message).startswith("AutoLR") for warning in caught)
    if losses is not None:
        exact = exact and evaluator.name in ("inplace", "streamed")
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": rtol, "atol": rtol / 100}
        torch.testing.assert_close(losses, list(expected.values()), equal_nan=True, **tolerance)
    return reason
