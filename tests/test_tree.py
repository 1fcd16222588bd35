import copy
import io
import math
from functools import partial

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autolr_fast import FACTORS_3, FACTORS_5, ALRTree, reference
from autolr_fast._tree.epoch import prune
from autolr_fast._tree.optimizers import StackedAdam, StackedAdamW, StackedSGD

from .helpers import (
    ON_GPU,
    KeepsWeights,
    Recurrent,
    Tied,
    UpdatesBuffer,
    convnet,
    mlp,
    seeded,
    spectral,
    transformer,
)

EXAMPLES = 22  # batches of 8, 8 and 6
DATA = {
    "vectors": lambda: torch.randn(EXAMPLES, 5),
    "images": lambda: torch.randn(EXAMPLES, 2, 4, 4),
    "words": lambda: torch.randint(11, (EXAMPLES, 4)),
    "sequences": lambda: torch.randn(EXAMPLES, 4, 8),
    "series": lambda: torch.randn(EXAMPLES, 6, 5),
}


def momentum_statistics():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3))


def partly_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


class PartlyUnused(nn.Module):
    """A part of it takes no part, so that weight decay must leave it alone."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.used(x)


# name -> (model, data, whether it can be batched)
MODELS = {
    "mlp": (mlp, "vectors", True),
    "convnet": (partial(convnet, dropout=0.0), "images", True),
    "dropout": (convnet, "images", True),
    "dropout-of-linear": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.3), nn.Linear(9, 3)),
        "vectors",
        True,
    ),
    "tied": (Tied, "words", True),
    "transformer": (transformer, "sequences", True),
    "partly-frozen": (partly_frozen, "vectors", True),
    "partly-unused": (PartlyUnused, "vectors", True),
    "recurrent": (Recurrent, "series", False),
    "keeps-weights": (KeepsWeights, "vectors", False),
    "updates-buffer": (UpdatesBuffer, "vectors", False),
    "spectral-norm": (spectral, "vectors", False),
    "cumulative-batchnorm": (momentum_statistics, "vectors", False),
}
MOMENTUM = {"momentum": 0.9}
OPTIMIZERS = {
    "sgd": ({}, torch.optim.SGD),
    "decay": ({"optimizer_options": {"weight_decay": 0.1}}, partial(torch.optim.SGD, weight_decay=0.1)),
    "momentum": (
        {"optimizer_options": {"momentum": 0.9, "dampening": 0.1}},
        partial(torch.optim.SGD, momentum=0.9, dampening=0.1),
    ),
    "nesterov": (
        {"optimizer_options": {"momentum": 0.9, "nesterov": True}},
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    ),
    "adam": (
        {"optimizer": "adam", "optimizer_options": {"weight_decay": 0.1}},
        partial(torch.optim.Adam, weight_decay=0.1),
    ),
    "adamw": (
        {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}},
        partial(torch.optim.AdamW, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    ),
}


def problem(name):
    make, data, _ = MODELS[name]
    model, x, y = seeded(make, DATA[data], EXAMPLES)
    return model, list(zip(x.split(8), y.split(8), strict=True))


def history_of(tree):
    return [[tuple(branch) for branch in epoch.branches] for epoch in tree.history]


def assert_equals_reference(tree, model, expected, rtol=1e-4, atol=1e-5):
    beams, history = expected
    assert [[branch[:2] for branch in epoch] for epoch in history_of(tree)] == [
        [branch[:2] for branch in epoch] for epoch in history
    ]
    for epoch, seen in zip(history, history_of(tree), strict=True):
        losses = torch.tensor([[branch[2] for branch in epoch], [branch[2] for branch in seen]])
        torch.testing.assert_close(losses[1], losses[0], rtol=rtol, atol=atol)
    assert tree.learning_rates == [beam.lr for beam in beams]
    best = beams[0].model.state_dict()
    assert tree.best_model() is model
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, best[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("method", ["batched", "sequential"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_equals_one_training_after_another(name, method):
    model, batches = problem(name)
    # On a GPU, torch's kernels for the gradients of attention refuse what vmap gives them.
    attends = name == "transformer" and ON_GPU
    if method == "batched" and (attends or not MODELS[name][2]):
        with pytest.raises(RuntimeError, match=f"method='batched' cannot serve {type(model).__name__}"):
            ALRTree(model, F.cross_entropy, 0.05, method=method).fit(batches, 1)
        return
    torch.manual_seed(2)
    expected = reference.tree_search(model, F.cross_entropy, [0.05], batches, 3)
    torch.manual_seed(2)
    tree = ALRTree(model, F.cross_entropy, 0.05, method=method)
    tree.fit(batches, 3)
    assert_equals_reference(tree, model, expected)


@pytest.mark.parametrize("method", ["batched", "sequential"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_optimizers(optimizer, method):
    arguments, make = OPTIMIZERS[optimizer]
    model, batches = problem("mlp")
    expected = reference.tree_search(model, F.cross_entropy, [0.02], batches, 3, optimizer=make)
    tree = ALRTree(model, F.cross_entropy, 0.02, method=method, **arguments)
    tree.fit(batches, 3)
    assert_equals_reference(tree, model, expected)


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("factors", [FACTORS_3, FACTORS_5, (0.3, 3.0)])
@pytest.mark.parametrize("max_memory", [None, 1, 3000])
def test_beams_factors_and_chunks(beams, factors, max_memory):
    model, batches = problem("mlp")
    settings = {"beams": beams, "factors": factors}
    expected = reference.tree_search(model, F.cross_entropy, [0.1], batches, 3, **settings)
    tree = ALRTree(model, F.cross_entropy, 0.1, method="batched", max_memory=max_memory, **settings)
    tree.fit(batches, 3)
    assert_equals_reference(tree, model, expected)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_several_rates_to_start_from(kind):
    model, batches = problem("mlp")
    lrs = kind([0.125, 0.5, 0.25])
    expected = reference.tree_search(model, F.cross_entropy, lrs, batches, 2)
    tree = ALRTree(model, F.cross_entropy, lrs, method="batched")
    tree.fit(batches, 2)
    assert_equals_reference(tree, model, expected)


def test_chunks_see_the_same_dropout_masks():
    ends = []
    for memory in (None, 1):
        model, batches = problem("dropout")
        torch.manual_seed(2)
        tree = ALRTree(model, F.cross_entropy, 0.05, method="batched", max_memory=memory)
        tree.fit(batches, 2)
        ends.append([*history_of(tree), torch.get_rng_state()])
    assert torch.equal(ends[0].pop(), ends[1].pop())
    for epoch, other in zip(*ends, strict=True):
        torch.testing.assert_close(torch.tensor(epoch), torch.tensor(other), rtol=1e-4, atol=1e-5)


def test_by_hand():
    """loss (w - 1)^2 / 2 of one batch of two: w <- w + lr * (1 - w); epochs of two batches from w = 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    one = torch.ones(2, 1)
    tree = ALRTree(model, lambda y, target: (y - target).square().mean() / 2, 0.5, beams=1)
    epoch = tree.fit_epoch([(one, one), (one, one)])
    # before the first step 1/2, before the second (1 - lr)^2 / 2
    assert [branch.loss for branch in epoch.branches] == [0.25, 0.3125, (0.5 + 0.75**2 / 2) / 2]
    assert epoch.survivors == (0,)  # lr 1 ends at the minimum
    assert model.weight.item() == 1.0
    assert tree.learning_rates == [1.0]
    # from the minimum all losses are 0: the first factor wins
    assert tree.fit_epoch([(one, one)]).survivors == (0,)
    assert tree.learning_rates == [2.0]


def test_batches_weigh_by_their_size():
    model, batches = problem("mlp")
    tree = ALRTree(model, F.cross_entropy, 1e-9)
    whole = F.cross_entropy(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]))
    assert tree.fit_epoch(batches).best.loss == pytest.approx(whole.item(), rel=1e-5)


@hypothesis.given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=12), st.integers(1, 6))
def test_prune(losses, beams):
    kept = prune(losses, beams)
    finite = [(loss, index) for index, loss in enumerate(losses) if math.isfinite(loss)]
    assert list(kept) == [index for _, index in sorted(finite)][:beams]


def test_a_branch_that_diverges_is_dropped_and_harms_no_other():
    model, batches = problem("mlp")
    alone, whole = (
        copy.deepcopy(model),
        [(torch.cat([x for x, _ in batches[:2]]), torch.cat([y for _, y in batches[:2]]))],
    )
    loss_fn = lambda y, target: F.mse_loss(y, F.one_hot(target, 3).float())  # noqa: E731
    for method in ("batched", "sequential"):
        tree = ALRTree(copy.deepcopy(alone), loss_fn, [1e30, 0.1], method=method, beams=2)
        epoch = tree.fit_epoch(whole * 3)
        assert [math.isfinite(branch.loss) for branch in epoch.branches] == [False] * 3 + [True] * 3
        assert {epoch.branches[index].parent for index in epoch.survivors} == {1}
        other = ALRTree(copy.deepcopy(alone), loss_fn, [0.1], method=method, beams=2)
        others = other.fit_epoch(whole * 3)
        torch.testing.assert_close(
            [branch.loss for branch in epoch.branches[3:]], [branch.loss for branch in others.branches]
        )


def test_all_branches_diverge():
    model, batches = problem("mlp")
    loss_fn = lambda y, target: F.mse_loss(y, F.one_hot(target, 3).float())  # noqa: E731
    tree = ALRTree(model, loss_fn, 0.1, optimizer_options=MOMENTUM)
    tree.fit(batches, 2)
    good, rates = copy.deepcopy(model.state_dict()), tree.learning_rates
    with pytest.raises(RuntimeError, match=r"no branch of epoch 3 has a finite loss, at learning rates .* epoch 2"):
        tree.fit_epoch([(x * math.inf, y) for x, y in batches])
    assert all(torch.equal(value, good[name]) for name, value in model.state_dict().items())
    assert tree.learning_rates == rates[:1]
    assert tree.epoch == 2
    tree.fit(batches, 3)
    assert math.isfinite(tree.history[-1].best.loss)


def loader(generator=None):
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(EXAMPLES, 2, 4, 4), torch.randint(3, (EXAMPLES,)))
    return DataLoader(data, batch_size=8, shuffle=True, generator=generator)


def make_tree(optimizer, generator=None, method="batched"):
    torch.manual_seed(1)
    arguments, _ = OPTIMIZERS[optimizer]
    return ALRTree(convnet(), F.cross_entropy, 0.02, method=method, generator=generator, **arguments)


def stored(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.cpu  # whose generator shuffles
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 5])
def test_resumes_bit_for_bit(batches, optimizer, own_generator):
    """Killed after so many batches, of three an epoch; dropout and shuffling go on where they were."""

    def start():
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return make_tree(optimizer, generator), loader(generator)

    tree, data = start()
    torch.manual_seed(7)
    tree.fit(data, 3)
    expected = [*tree.model.state_dict().values(), torch.get_rng_state()]

    class KilledError(Exception):
        pass

    tree, data = start()
    steps = []
    step = tree.step

    def counted(x, y):
        if len(steps) == batches:
            raise KilledError
        steps.append(1)
        return step(x, y)

    tree.step = counted
    torch.manual_seed(7)
    with pytest.raises(KilledError):
        tree.fit(data, 3)
    state = stored(tree.state_dict())

    other, data = start()
    other.load_state_dict(state)
    other.fit(data, 3)
    ended = [*other.model.state_dict().values(), torch.get_rng_state()]
    assert len(other.history) == 3
    for a, b in zip(ended, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.cpu  # whose generator shuffles
def test_goes_on_with_an_epoch_that_was_interrupted():
    tree, data = make_tree("momentum"), loader()
    torch.manual_seed(7)
    tree.fit(data, 2)
    expected = history_of(tree)
    tree, data = make_tree("momentum"), loader()
    torch.manual_seed(7)

    def interrupted():
        for number, batch in enumerate(data):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        tree.fit_epoch(interrupted())
    tree.fit(data, 2)
    assert history_of(tree) == expected


def test_auto_warns_once_of_a_model_that_cannot_be_batched():
    model, batches = problem("keeps-weights")
    tree = ALRTree(model, F.cross_entropy, 0.05)
    with pytest.warns(UserWarning, match="one after another, since batched, the loss of a test model") as caught:
        tree.fit(batches, 2)
    assert [warning.filename for warning in caught] == [__file__]
    assert "method='sequential' (auto: batched, the loss" in repr(tree)


@pytest.mark.parametrize("faster", ["batched", "sequential"])
def test_auto_takes_what_it_measured_to_be_faster(faster, monkeypatch):
    """For one beam, and then again for two."""
    model, batches = problem("mlp")
    # alone and batched, 3 models and 6
    clock = iter([1.0, 2.9, 1.0, 6.1] if faster == "batched" else [1.0, 3.1, 1.0, 5.9])
    monkeypatch.setattr("autolr_fast._tree.trainer.seconds", lambda run: next(clock))
    tree = ALRTree(model, F.cross_entropy, 0.05)
    tree.fit_epoch(batches)
    assert tree.method == faster
    tree.fit_epoch(batches)
    other = {"batched": "sequential", "sequential": "batched"}[faster]
    assert tree.method == other
    resumed = ALRTree(mlp(), F.cross_entropy, 0.05)
    resumed.load_state_dict(tree.state_dict())
    assert repr(resumed) == repr(tree)
    tree.fit_epoch(batches)
    resumed.fit_epoch(batches)
    assert history_of(resumed) == history_of(tree)
    assert f"method='{other}' (auto: a model takes" in repr(tree)


def test_auto_does_not_measure_under_deterministic_algorithms():
    model, batches = problem("mlp")
    torch.use_deterministic_algorithms(True)
    try:
        tree = ALRTree(model, F.cross_entropy, 0.05)
        tree.fit_epoch(batches)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "method='batched')" in repr(tree)


@pytest.mark.parametrize("method", ["batched", "sequential"])
def test_autocast_around_the_search(method):
    """Its cache holds casts of weights that have moved on."""
    ends = []
    for around in (False, True):
        model, batches = problem("mlp")
        tree = ALRTree(model, F.cross_entropy, 0.5, method=method)
        if around:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                tree.fit(batches, 3)
        else:
            for _ in range(3):
                for batch in batches:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        tree.step(*batch)
                tree.end_epoch()
        ends.append([*history_of(tree), *(p.detach() for p in model.parameters())])
    torch.testing.assert_close(*ends, rtol=0.0, atol=0.0)


def test_memory_runs_out(monkeypatch):
    """Half as many models at once, and again, and the same result."""
    from autolr_fast._tree import passes  # noqa: PLC0415

    model, batches = problem("dropout")
    torch.manual_seed(2)
    expected = reference.tree_search(model, F.cross_entropy, [0.05], batches, 2)
    plain, sizes = passes.BatchedPass.__call__, []

    def limited(self, rows, x, y):
        sizes.append(len(next(iter(rows.parameters.values()))))
        result = plain(self, rows, x, y)
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("none left")
        return result

    monkeypatch.setattr(passes.BatchedPass, "__call__", limited)
    torch.manual_seed(2)
    tree = ALRTree(model, F.cross_entropy, 0.05, method="batched")
    tree.fit(batches, 2)
    assert max(sizes) == 3
    assert tree.state_dict()["trainer"]["chunk_models"] == 2
    assert_equals_reference(tree, model, expected)


def test_modes_stay_what_they_were():
    model, batches = problem("dropout")
    model[1].eval()
    tree = ALRTree(model, F.cross_entropy, 0.05, method="batched")
    tree.fit(batches, 1, callback=lambda epoch: model.eval())
    before = model[1].running_mean.clone()
    tree.fit(batches, 2)
    assert (model[0].training, model[1].training) == (True, False)
    assert torch.equal(model[1].running_mean, before)


def test_live_parameters_keep_their_places():
    model, batches = problem("convnet")
    addresses = [p.data_ptr() for p in model.parameters()]
    ALRTree(model, F.cross_entropy, 0.05).fit(batches, 2)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("keyword", [True, False])
def test_several_inputs(keyword):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, a, b):
            return self.inner(a - b)

    model, (a, b) = Two(), torch.randn(2, 8, 5)
    x = {"a": a, "b": b} if keyword else [a, b]
    ALRTree(model, F.cross_entropy, 0.05, method="batched").fit([(x, torch.randint(3, (8,)))] * 2, 2)


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stacked_sgd_equals_torch(settings, dtype):
    rates, rule = [0.1, 0.2], StackedSGD(**settings)
    params = [torch.randn(2, 3, 4).to(dtype), torch.randn(2, 5).to(dtype)]
    models = [[nn.Parameter(p[k].clone()) for p in params] for k in range(2)]
    optimizers = [torch.optim.SGD(m, lr=lr, **settings) for m, lr in zip(models, rates, strict=True)]
    state = [[torch.zeros_like(p) for p in params] for _ in rule.buffers]
    for taken in range(3):
        grads = [torch.randn_like(p) for p in params]
        rule.step(params, grads, state, taken, rates)
        for k, optimizer in enumerate(optimizers):
            for p, grad in zip(models[k], grads, strict=True):
                p.grad = grad[k].clone()
            optimizer.step()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
    for k in range(2):
        for p, expected in zip(params, models[k], strict=True):
            torch.testing.assert_close(p[k], expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("stacked", "kind"), [(StackedAdam, torch.optim.Adam), (StackedAdamW, torch.optim.AdamW)])
def test_stacked_adam_equals_torch(stacked, kind):
    rates, rule = [0.1, 0.2], stacked(weight_decay=0.1)
    params = [torch.randn(2, 3, 4, dtype=torch.float64)]
    models = [nn.Parameter(params[0][k].clone()) for k in range(2)]
    optimizers = [kind([m], lr=lr, weight_decay=0.1) for m, lr in zip(models, rates, strict=True)]
    state = [[torch.zeros_like(p) for p in params] for _ in rule.buffers]
    for taken in range(5):
        grad = torch.randn(2, 3, 4, dtype=torch.float64)
        rule.step(params, [grad], state, taken, rates)
        for k, optimizer in enumerate(optimizers):
            models[k].grad = grad[k].clone()
            optimizer.step()
    for k in range(2):
        torch.testing.assert_close(params[0][k], models[k].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": None}, TypeError, "model=None: expected a torch.nn.Module"),
        ({"model": nn.Linear(1, 1).requires_grad_(False)}, ValueError, "no parameter that requires a gradient"),
        ({"loss_fn": None}, TypeError, "loss_fn=None: expected a callable"),
        ({"lr": 0}, ValueError, "lr=0: expected a positive number, or a list"),
        ({"lr": []}, ValueError, r"lr=\[\]"),
        ({"lr": [0.1, math.nan]}, ValueError, r"lr=\[0.1, nan\]"),
        ({"lr": "0.1"}, ValueError, "lr='0.1'"),
        ({"lr": True}, ValueError, "lr=True"),
        ({"model": nn.LazyLinear(3)}, ValueError, "'weight' has no shape yet: run a batch through"),
        (
            {"model": nn.ParameterList([torch.zeros(1, dtype=torch.complex64)])},
            ValueError,
            "'0' is torch.complex64",
        ),
        ({"generator": 3}, TypeError, "generator=3: expected the torch.Generator"),
        ({"beams": 0}, ValueError, "beams=0: expected 1 or more models"),
        ({"beams": 1.5}, TypeError, "beams=1.5: expected a whole number of models, 1 or more"),
        ({"factors": (2.0, 1.0)}, ValueError, "one way only"),
        ({"optimizer": "lamb"}, ValueError, "optimizer='lamb' is not known: use one of 'sgd', 'adam', 'adamw'"),
        ({"method": "fast"}, ValueError, "method='fast' is not known: use one of 'auto', 'batched', 'sequential'"),
        ({"max_memory": 0}, ValueError, "max_memory=0: give a positive whole number of bytes"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        ALRTree(**{"model": mlp(), "loss_fn": F.cross_entropy, "lr": 0.1, **arguments})


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "says"),
    [
        (
            "sgd",
            0.9,
            TypeError,
            r"optimizer_options=0.9: expected a dict, such as \{'weight_decay': 0.1\}, or None",
        ),
        ("sgd", {"betas": (0.9, 0.9)}, ValueError, "has 'betas', which optimizer='sgd' does not know: give any of"),
        ("adamw", {"momentum": 0.9}, ValueError, "has 'momentum', which optimizer='adamw' does not know.*'eps'"),
        ("adam", {"lr": 0.9}, ValueError, "has 'lr', which optimizer='adam' does not know"),
        ("sgd", {"momentum": -1}, ValueError, "momentum=-1: give a number, 0 or more"),
        ("sgd", {"dampening": "no"}, ValueError, "dampening='no': give a number"),
        ("sgd", {"nesterov": True}, ValueError, "nesterov=True needs a momentum"),
        ("adam", {"weight_decay": -1}, ValueError, "weight_decay=-1"),
        ("adam", {"weight_decay": None}, ValueError, "weight_decay=None: give a number"),
        ("adam", {"betas": 0.9}, ValueError, "betas=0.9: give two numbers"),
        ("adam", {"betas": (0.9, 1.0)}, ValueError, r"betas=\(0.9, 1.0\)"),
    ],
)
def test_bad_optimizer_options(optimizer, options, error, says):
    with pytest.raises(error, match=says):
        ALRTree(mlp(), F.cross_entropy, 0.1, optimizer=optimizer, optimizer_options=options)


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], ValueError, r"loader=\[\] gave no batches"),
        ([torch.ones(3)], ValueError, "loader gave Tensor tensor.*: expected pairs"),
        ([(1, 2, 3)], ValueError, r"loader gave tuple \(1, 2, 3\)"),
    ],
)
def test_bad_batches(batches, error, says):
    tree = ALRTree(mlp(), F.cross_entropy, 0.1)
    with pytest.raises(error, match=says):
        tree.fit_epoch(batches)
    assert tree.fit_epoch(problem("mlp")[1]).number == 1


def test_bad_fit():
    tree, (_, batches) = ALRTree(mlp(), F.cross_entropy, 0.1), problem("mlp")
    for epochs in (1.5, "3", -1, True):
        with pytest.raises(
            (TypeError, ValueError), match=f"epochs={epochs!r}: expected .* epochs that there shall"
        ):
            tree.fit(batches, epochs)
    with pytest.raises(TypeError, match="callback=3"):
        tree.fit(batches, 1, callback=3)
    tree.step(*batches[0])
    with pytest.raises(RuntimeError, match=r"begun by step\(\)"):
        tree.fit_epoch(batches)
    assert tree.end_epoch().number == 1
    with pytest.raises(ValueError, match="a loss that no parameter has a part in"):
        ALRTree(mlp(), lambda y, target: F.cross_entropy(y.detach(), target), 0.1).fit(batches, 1)


class TwoDomains(nn.Module):
    """Batches take turns at two normalisations; the second is not used at first."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])

    def forward(self, x, domain):
        return self.outer(self.norms[domain](self.inner(x)))


@pytest.mark.parametrize("method", ["batched", "sequential"])
def test_statistics_that_the_first_batch_does_not_touch(method):
    torch.manual_seed(1)
    model, (_, batches) = TwoDomains(), problem("mlp")

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, pair):
            return self.inner(*pair)

    mixed = [((x, number % 2), y) for number, (x, y) in enumerate(batches)]
    beams, _ = reference.tree_search(Pairs(), F.cross_entropy, [0.05], mixed, 2)
    ALRTree(model, F.cross_entropy, 0.05, method=method).fit(mixed, 2)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, beams[0].model.inner.state_dict()[name], rtol=1e-4, atol=1e-5)


class Remembers(nn.Module):
    """Keeps a running mean, in an attribute or in a buffer that it begins to write to later."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.calls, self.kind = nn.Linear(5, 3), 0, kind
        if kind == "late":
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("seen", torch.zeros(()))
        else:
            self.mean = torch.zeros(3)

    def forward(self, x):
        y = self.inner(x)
        if self.kind == "attribute":
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        elif self.mean.sum() != 0 or len(x) == 6:  # the last batch
            self.mean.mul_(0.9).add_(y.detach().mean(0))
        return y - self.mean


@pytest.mark.parametrize("method", ["auto", "sequential"])
def test_what_is_kept_outside_of_buffers_does_not_pass_from_branch_to_branch(method):
    torch.manual_seed(1)
    model, (_, batches) = Remembers("attribute"), problem("mlp")
    kept = model.mean
    epoch = ALRTree(model, F.cross_entropy, [0.1] * 2, factors=(2, 0.5), method=method).fit_epoch(batches[:1])
    # losses before the first step: all branches are the same model
    assert len({round(branch.loss, 5) for branch in epoch.branches}) == 1
    assert model.mean is kept
    assert torch.equal(kept, torch.zeros(3))
    copy.deepcopy(model)


@pytest.mark.parametrize("method", ["batched", "sequential"])
def test_an_attribute_may_be_changed_between_epochs(method):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(5, 3), 1.0

        def forward(self, x):
            return self.inner(x) * self.scale

    model, (_, batches) = Scaled(), problem("mlp")
    tree = ALRTree(model, F.cross_entropy, 0.1, method=method)
    tree.fit_epoch(batches)
    model.scale = 0.0
    assert tree.fit_epoch(batches).best.loss == pytest.approx(math.log(3), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_buffer_that_changes_later_is_an_error():
    model, (_, batches) = Remembers("late"), problem("mlp")
    with pytest.raises(RuntimeError, match="buffer 'mean' changes at this batch and did not at the first"):
        ALRTree(model, F.cross_entropy, 0.1, method="sequential").fit_epoch(batches)


@pytest.mark.parametrize("call", [5, 6, 7, 8])
def test_goes_on_with_a_batch_that_was_interrupted_half_way(call):
    """After some branches of it; saved and loaded in between, too."""
    model, batches = problem("dropout")
    torch.manual_seed(2)
    expected = reference.tree_search(model, F.cross_entropy, [0.05], batches, 2)
    calls = []

    def loss_fn(y, target):
        calls.append(1)
        if len(calls) == call:
            raise OSError("no data")
        return F.cross_entropy(y, target)

    torch.manual_seed(2)
    tree = ALRTree(model, loss_fn, 0.05, method="sequential")
    with pytest.raises(OSError, match="no data"):
        tree.fit(batches, 2)
    state = stored(tree.state_dict())
    torch.rand(3)
    other, _ = problem("dropout")
    resumed = ALRTree(other, F.cross_entropy, 0.05, method="sequential")
    resumed.load_state_dict(state)
    resumed.fit(batches, 2)
    assert_equals_reference(resumed, other, expected)


def test_a_step_that_was_interrupted_half_way_is_taken_again():
    """With the dropout masks that the first branches had."""
    model, batches = problem("dropout")
    torch.manual_seed(2)
    expected = reference.tree_search(model, F.cross_entropy, [0.05], batches, 1)
    calls = []

    def loss_fn(y, target):
        calls.append(1)
        if len(calls) == 7:  # one finds the buffers, three are of each batch
            raise OSError("no data")
        return F.cross_entropy(y, target)

    torch.manual_seed(2)
    tree = ALRTree(model, loss_fn, 0.05, method="sequential")
    tree.step(*batches[0])
    with pytest.raises(OSError, match="no data"):
        tree.step(*batches[1])
    torch.rand(3)
    for batch in batches[1:]:
        tree.step(*batch)
    tree.end_epoch()
    assert_equals_reference(tree, model, expected)


@pytest.mark.cpu  # whose generator shuffles
@pytest.mark.parametrize("method", ["batched", "sequential"])
def test_loads_in_eval_mode(method):
    ends = []
    for evaluates in (False, True):
        tree, data = make_tree("momentum", method=method), loader()
        torch.manual_seed(7)
        tree.fit(data, 1)
        state = tree.state_dict()
        if evaluates:
            tree.model.eval()
        tree.load_state_dict(state)
        tree.fit(data, 2)
        ends.append(history_of(tree))
    assert ends[0] == ends[1]


def test_a_model_that_differentiates_inside():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = mlp()

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    torch.manual_seed(1)
    model, batches = Force(), [(torch.randn(8, 5), torch.randn(8, 5))] * 2
    expected = reference.tree_search(model, F.mse_loss, [0.1], batches, 2)
    tree = ALRTree(model, F.mse_loss, 0.1, method="sequential")
    tree.fit(batches, 2)
    assert_equals_reference(tree, model, expected)


def test_sparse_gradients():
    torch.manual_seed(1)
    make = lambda sparse: nn.Sequential(nn.EmbeddingBag(11, 3, sparse=sparse, mode="sum"))  # noqa: E731
    sparse, dense = make(True), make(False)
    dense.load_state_dict(sparse.state_dict())
    batches = [(torch.randint(11, (8, 4)), torch.randint(3, (8,)))] * 3
    trees = [ALRTree(model, F.cross_entropy, 0.1, method="sequential") for model in (sparse, dense)]
    for tree in trees:
        tree.fit(batches, 2)
    torch.testing.assert_close(sparse[0].weight, dense[0].weight)


def test_bad_loss():
    _, batches = problem("mlp")
    tree = ALRTree(mlp(), partial(F.cross_entropy, reduction="none"), 0.1)
    with pytest.raises(TypeError, match=r"loss_fn returned a tensor of shape \[8\]: return the mean loss"):
        tree.fit_epoch(batches)
    with pytest.raises(RuntimeError, match="no batch was seen"):
        tree.end_epoch()


def test_bad_state():
    _, batches = problem("mlp")
    tree = ALRTree(mlp(), F.cross_entropy, 0.1, beams=3)
    tree.fit(batches, 2)
    state = tree.state_dict()
    before = copy.deepcopy(state)
    for other, says in (
        (
            ALRTree(mlp(), F.cross_entropy, 0.1, beams=1, factors=(2.0, 0.5)),
            r"'0.weight' of shape \[3, 16, 5\] and this tree \[2, 16, 5\]",
        ),
        (ALRTree(transformer(), F.cross_entropy, 0.1), "state_dict and this tree differ in '0.bias'"),
        (ALRTree(nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)), F.cross_entropy, 0.1), "of shape"),
        (ALRTree(mlp(), F.cross_entropy, 0.1, optimizer_options=MOMENTUM), "differ in 'momentum_buffer'"),
    ):
        with pytest.raises(ValueError, match=says):
            other.load_state_dict(state)
        assert other.epoch == 0
    with_momentum = ALRTree(mlp(), F.cross_entropy, 0.1, optimizer_options=MOMENTUM)
    with_momentum.fit(batches, 1)
    with pytest.raises(ValueError, match="differ in 'momentum_buffer': give ALRTree the model, optimizer"):
        tree.load_state_dict(with_momentum.state_dict())
    with_momentum.step(*batches[0])
    with pytest.raises(ValueError, match=r"factors \[2.0, 1.0, 0.5\], and this tree has \[2.0, 0.5\]"):
        ALRTree(mlp(), F.cross_entropy, 0.1, optimizer_options=MOMENTUM, factors=(2, 0.5)).load_state_dict(
            with_momentum.state_dict()
        )
    with pytest.raises(TypeError, match="state_dict=None"):
        tree.load_state_dict(None)
    del before["random"]  # of all that draw
    assert str({name: value for name, value in tree.state_dict().items() if name != "random"}) == str(before)


@pytest.mark.parametrize("key", ["random", "trainer.method", "stack.tensors", "epoch.batches"])
def test_a_state_of_another_version_is_named(key):
    """At any of its keys that is missing or not known, and nothing is loaded."""
    _, batches = problem("mlp")
    tree, other = (ALRTree(mlp(), F.cross_entropy, 0.1) for _ in range(2))
    tree.fit(batches, 1)
    tree.step(*batches[0])
    *outer, name = key.split(".")
    for change, fault in (
        (lambda within: within.pop(name), f"state_dict has no {key!r}"),
        (lambda within: within.update({name + "_": 1}), f"state_dict has {key + '_'!r}, which is not known here"),
    ):
        state = {**tree.state_dict(), "version": 7, "saved_by": "autolr_fast 9"}
        change(state[outer[0]] if outer else state)
        with pytest.raises(ValueError, match=f"{fault}: it was saved by autolr_fast 9, version 7, and this is"):
            other.load_state_dict(state)
        assert other.epoch == 0
    other.load_state_dict(tree.state_dict())
    assert other.epoch == 1


def test_a_first_batch_that_failed_begins_no_epoch():
    """Neither by step() nor by fit_epoch(): the loader's first batch is still the first."""
    model, batches = problem("mlp")
    expected = reference.tree_search(model, F.cross_entropy, [0.05], batches, 1)
    tree = ALRTree(model, F.cross_entropy, 0.05)
    with pytest.raises(RuntimeError):
        tree.step(torch.ones(8, 4), batches[0][1])
    with pytest.raises(RuntimeError):
        tree.fit_epoch([(torch.ones(8, 4), batches[0][1])])
    tree.fit_epoch(batches)
    assert_equals_reference(tree, model, expected)
