import collections
import contextlib
import copy
import itertools
import math
import random
import re
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolr_fast import FACTORS_3, FACTORS_5, Auto, ClosureError, InPlace, Stacked, Streamed
from autolr_fast._evaluators import EVALUATORS, EvaluatorError, resolve_evaluator
from autolr_fast._evaluators.inplace import rewritten
from autolr_fast._isolation import Isolation, check_repeatable
from autolr_fast._steps import StepLine

from .helpers import (
    MODELS,
    ON_GPU,
    UNBATCHED,
    KeepsWeights,
    Recurrent,
    assert_same,
    everything,
    losses_of_copies,
    mlp,
    parameters_of,
    problem,
    refusal_of,
    train_step,
)

BATCHED = sorted(set(MODELS) - UNBATCHED)


def probed(model, loss_of, **kwargs):
    """The optimizer, and the line over one real step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    train_step(model, optimizer, loss_of)
    before = parameters_of(model)
    train_step(model, optimizer, loss_of)
    names = {parameter: name for name, parameter in model.named_parameters()}
    prev = {parameter: before[name] for parameter, name in names.items() if parameter.requires_grad}
    return (
        optimizer,
        StepLine(prev, names, window=1),
        {names[parameter]: value for parameter, value in prev.items()},
    )


@pytest.mark.parametrize("evaluator", [InPlace, Streamed])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_one_after_another_equals_deep_copies_bitwise(name, evaluator):
    model, loss_of = problem(name)
    _, line, prev = probed(model, loss_of)
    expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
    losses = evaluator().losses(model, line, FACTORS_5, lambda: loss_of(model)).tolist()
    another_path = ON_GPU and evaluator is Streamed and name in ("transformer", "attention-dropout")
    assert losses == (pytest.approx(expected, rel=1e-6) if another_path else expected)
    assert len(set(expected)) == len(FACTORS_5)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", BATCHED)
def test_stacked_equals_deep_copies(name, rows):
    model, loss_of = problem(name)
    _, line, prev = probed(model, loss_of)
    one = sum(parameter.numel() * parameter.element_size() for parameter in line.parameters)
    evaluator = Stacked(max_memory=rows * one)
    losses = evaluator.losses(model, line, FACTORS_5, lambda: loss_of(model))
    expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-5, atol=1e-6)
    assert evaluator.state() == {"chunk": rows}


@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 0.03, 0.02)],
)
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_dtypes(name, dtype, atol, rtol):
    model, _ = problem(name)
    model.to(dtype)
    x, y = MODELS[name][1]().to(dtype), torch.randint(3, (12,))

    def loss_of(model):
        return F.cross_entropy(model(x), y)

    _, line, prev = probed(model, loss_of)
    factors = [1.9, 1.0, 0.3]
    expected = torch.tensor(losses_of_copies(model, prev, factors, loss_of), dtype=dtype)
    assert torch.equal(InPlace().losses(model, line, factors, lambda: loss_of(model)), expected)
    losses = Stacked().losses(model, line, factors, lambda: loss_of(model))
    torch.testing.assert_close(losses, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("evaluator", sorted(EVALUATORS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_nothing_changes(name, evaluator):
    model, loss_of = problem(name)
    optimizer, line, _ = probed(model, loss_of)
    before = everything(model, optimizer)
    objects = [id(t) for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    addresses = [p.data_ptr() for p in model.parameters()]
    others = (random.getstate(), numpy.random.get_state(legacy=False)["state"])

    def closure():
        random.random()
        numpy.random.rand()
        return loss_of(model)

    expected = contextlib.nullcontext()
    if name in UNBATCHED and evaluator == "stacked":
        expected = pytest.raises(EvaluatorError)
    elif name in UNBATCHED and evaluator == "auto":
        expected = pytest.warns(UserWarning, match="one after another")
    with expected:
        resolve_evaluator(evaluator).losses(model, line, FACTORS_5, closure)
    assert_same(before, everything(model, optimizer))
    assert objects == [
        id(t) for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))
    ]
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert others[0] == random.getstate()
    numpy.testing.assert_equal(others[1], numpy.random.get_state(legacy=False)["state"])


@pytest.mark.parametrize("name", ["convnet", "updates-buffer", "tied"])
@pytest.mark.parametrize("evaluator", sorted(EVALUATORS))
def test_nothing_changes_when_the_closure_raises(name, evaluator):
    """At each call: in the checks of a new model, and at each candidate."""
    raise_at = raises = 0

    def closure():
        nonlocal raise_at
        loss = loss_of(model)
        raise_at -= 1
        if raise_at == 0:
            raise KeyError("user's own")
        return loss

    while raises < 60:
        model, loss_of = problem(name)
        optimizer, line, _ = probed(model, loss_of)
        before = everything(model, optimizer)
        raise_at = raises + 1
        chosen = Stacked(max_memory=1) if evaluator == "stacked" else resolve_evaluator(evaluator)
        with contextlib.suppress(KeyError, EvaluatorError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # auto does without what raised
            chosen.losses(model, line, FACTORS_5, closure)
        assert_same(before, everything(model, optimizer))
        if raise_at > 0:  # it was never called so often
            break
        raises += 1
    checks = 3
    expected = {"inplace": 5, "streamed": checks + 5, "stacked": checks + 2 + 5}
    if evaluator in expected:
        assert raises == expected[evaluator]


@pytest.mark.parametrize("evaluator", ["inplace", "stacked", "streamed"])
def test_same_dropout_masks_for_all(evaluator):
    """Candidates that are all alike differ by their masks alone: equal losses mean equal masks."""
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    line = StepLine({p: p.detach().clone() for p in model.parameters()}, {}, window=1)
    chosen = Stacked(max_memory=1) if evaluator == "stacked" else resolve_evaluator(evaluator)
    losses = chosen.losses(model, line, FACTORS_5, lambda: F.cross_entropy(model(x), y))
    assert len(set(losses.tolist())) == 1
    torch.manual_seed(0)
    masked = {F.cross_entropy(model(x), y).item() for _ in range(5)}
    assert len(masked) == 5


def test_auto_says_once_why_it_does_not_batch():
    model = Recurrent()
    x, y = torch.randn(6, 4, 5), torch.randint(3, (6,))

    def loss_of(model):
        return F.cross_entropy(model(x), y)

    _, line, prev = probed(model, loss_of)
    auto = Auto()
    assert auto.name == "auto"
    with pytest.warns(UserWarning, match="one after another.*lstm.*evaluator='streamed'") as caught:
        losses = auto.losses(model, line, FACTORS_5, lambda: loss_of(model))
    assert caught[0].filename == __file__
    assert auto.name in ("streamed", "inplace")
    assert losses.tolist() == losses_of_copies(model, prev, FACTORS_5, loss_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto.losses(model, line, FACTORS_5, lambda: loss_of(model))


def run_clock(monkeypatch, seconds):
    """Let auto measure what ``seconds`` says of an evaluator."""
    monkeypatch.setattr("autolr_fast._evaluators.auto.seconds", lambda run: seconds(run.func.__self__))


@pytest.mark.parametrize("fastest", ["streamed", "inplace", "stacked"])
def test_auto_takes_what_it_measured_to_be_fastest(fastest, monkeypatch):
    """With clocks of which one runs slower; all of them are warm when they are timed."""
    timed = []

    def seconds(evaluator):
        timed.append(evaluator.name)
        return 0.2 if evaluator.name == fastest else 0.25

    run_clock(monkeypatch, seconds)
    model, loss_of = problem("mlp")
    _, line, prev = probed(model, loss_of)
    auto = Auto()
    losses = auto.losses(model, line, FACTORS_5, lambda: loss_of(model))
    assert losses.tolist() == losses_of_copies(model, prev, FACTORS_5, loss_of)
    assert auto.name == fastest
    assert f"{fastest} 200 ms" in repr(auto)
    assert timed == ["streamed", "inplace", "stacked"]
    resumed = Auto()
    resumed.load(auto.state())
    assert (repr(resumed), resumed.state()) == (repr(auto), auto.state())


@pytest.mark.parametrize("name", BATCHED)
def test_auto_measures_five_candidates(name):
    """By the real clock: it takes one that took least, and gives the right losses from the first call on."""
    model, loss_of = problem(name)
    _, line, prev = probed(model, loss_of)
    expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
    auto = Auto()
    for _ in range(2):
        losses = auto.losses(model, line, FACTORS_5, lambda: loss_of(model))
        torch.testing.assert_close(losses.tolist(), expected, rtol=1e-5, atol=1e-6)
    taken = {kind: float(ms) for kind, ms in re.findall(r"(\w+) ([\d.e+]+) ms", repr(auto))}
    assert list(taken) == ["streamed", "inplace", "stacked"]
    assert 0.94 * taken[auto.name] <= min(taken.values())


def test_auto_prefers_less_memory_to_a_little_time(monkeypatch):
    run_clock(monkeypatch, lambda evaluator: 0.2 if evaluator.name == "streamed" else 0.195)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    auto = Auto()
    auto.losses(model, line, FACTORS_5, lambda: loss_of(model))
    assert auto.name == "streamed"


def test_auto_does_not_batch_what_takes_long(monkeypatch):
    timed = []
    run_clock(monkeypatch, lambda evaluator: timed.append(evaluator.name) or 1.5)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    Auto().losses(model, line, FACTORS_5, lambda: loss_of(model))
    assert timed == ["streamed", "inplace"]


def test_auto_measures_nothing_for_few_candidates_of_few_parameters(monkeypatch):
    monkeypatch.setattr("autolr_fast._evaluators.auto.seconds", None)
    model, loss_of = problem("mlp")
    _, line, prev = probed(model, loss_of)
    auto, calls = Auto(), []
    losses = auto.losses(model, line, FACTORS_3, lambda: calls.append(1) or loss_of(model))
    assert losses.tolist() == losses_of_copies(model, prev, FACTORS_3, loss_of)
    assert repr(auto) == "'inplace' (auto: not measured for so few candidates)"
    assert len(calls) == 3


def test_auto_spares_a_copy_of_many_parameters(monkeypatch):
    """Few candidates of them are streamed, without a trial of anything else."""
    monkeypatch.setattr("autolr_fast._machine.memory.SMALL", 0)
    monkeypatch.setattr("autolr_fast._evaluators.auto.seconds", None)
    model, loss_of = problem("mlp")
    _, line, prev = probed(model, loss_of)
    auto = Auto()
    losses = auto.losses(model, line, FACTORS_3, lambda: loss_of(model))
    assert losses.tolist() == losses_of_copies(model, prev, FACTORS_3, loss_of)
    assert repr(auto) == "'streamed' (auto: not measured for so few candidates)"


@pytest.mark.parametrize("name", sorted(set(MODELS) - UNBATCHED))
@pytest.mark.parametrize("evaluator", ["streamed", "stacked"])
def test_many_parameters_are_checked_a_part_at_a_time(evaluator, name, monkeypatch):
    monkeypatch.setattr("autolr_fast._evaluators.streamed.SMALL", 0)
    model, loss_of = problem(name)
    optimizer, line, prev = probed(model, loss_of)
    copied = []
    monkeypatch.setattr(
        "autolr_fast._evaluators.streamed.rewritten", lambda part: copied.append(list(part)) or rewritten(part)
    )
    expected = dict(zip(FACTORS_3, losses_of_copies(model, prev, FACTORS_3, loss_of), strict=True))
    refused = refusal_of(evaluator, model=model, optimizer=optimizer, line=line, loss_of=loss_of, expected=expected)
    assert refused is None
    assert sorted(map(id, itertools.chain(*copied))) == sorted(map(id, line.parameters))
    total = sum(parameter.numel() for parameter in line.parameters)
    assert all(len(part) == 1 or sum(p.numel() for p in part) <= total / 4 for part in copied)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_out_of_reach_is_seen_in_whichever_part_it_is(layer, monkeypatch):
    monkeypatch.setattr("autolr_fast._evaluators.streamed.SMALL", 0)
    layers = [nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)]
    layers[layer] = torch.jit.trace(layers[layer], torch.randn(2, layers[layer].in_features))
    model, x = nn.Sequential(*layers), torch.randn(12, 5)
    prev = {parameter: parameter.detach() + 0.1 for parameter in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    with pytest.raises(EvaluatorError, match="where no torch function is given them"):
        Streamed().losses(model, line, FACTORS_3, lambda: model(x).square().mean())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
def test_auto_keeps_a_compiled_model_compiled(whole, monkeypatch):
    """Few candidates of many parameters would be streamed, which runs the Python that it was compiled from."""
    monkeypatch.setattr("autolr_fast._machine.memory.SMALL", 0)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model[0].compile(backend="eager")
    auto = Auto()
    auto.losses(model, line, FACTORS_3, lambda: loss_of(model))
    assert auto.name == "inplace"


def test_stacked_takes_more_candidates_than_one_call_writes():
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    factors = [2 ** (n / 16) for n in range(-35, 35)]
    losses = Stacked().losses(model, line, factors, lambda: loss_of(model))
    torch.testing.assert_close(losses, InPlace().losses(model, line, factors, lambda: loss_of(model)))


def test_auto_does_not_warn_where_there_is_nothing_to_gain(monkeypatch):
    monkeypatch.setattr("autolr_fast._machine.memory.SMALL", 0)
    model, x = OutOfReach("view"), torch.randn(12, 5)
    prev = {p: p.detach() + 0.1 for p in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    auto = Auto()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto.losses(model, line, FACTORS_3, lambda: model(x).square().mean())
    assert auto.name == "inplace"


def test_auto_measures_nothing_under_deterministic_algorithms(monkeypatch):
    monkeypatch.setattr("autolr_fast._evaluators.auto.seconds", None)
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    auto = Auto()
    torch.use_deterministic_algorithms(True)
    try:
        auto.losses(model, line, FACTORS_5, lambda: loss_of(model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert repr(auto) == "'streamed' (auto: not measured under deterministic algorithms)"


def test_named_evaluator_raises_with_cause_and_names():
    model = Recurrent()
    x = torch.randn(6, 4, 5)
    _, line, _ = probed(model, lambda model: model(x).square().mean())
    with pytest.raises(EvaluatorError, match="'stacked' cannot serve Recurrent.*lstm.*'inplace'.*'auto'") as raised:
        Stacked().losses(model, line, FACTORS_5, lambda: model(x).square().mean())
    assert "lstm" in str(raised.value.__cause__)


@pytest.mark.parametrize("evaluator", ["inplace", "stacked", "streamed"])
def test_weights_are_replaced_wherever_they_are_kept(evaluator):
    model = KeepsWeights()
    x, y = torch.randn(6, 5), torch.randint(3, (6,))

    def loss_of(model):
        return F.cross_entropy(model(x), y)

    _, line, prev = probed(model, loss_of)
    losses = resolve_evaluator(evaluator).losses(model, line, FACTORS_5, lambda: loss_of(model))
    # deepcopy breaks the second reference in the same way, so the candidates are evaluated by hand
    now = parameters_of(model)
    for factor, loss in zip(FACTORS_5, losses.tolist(), strict=True):
        weight, bias = (torch.lerp(prev[k], now[k], factor) for k in ("inner.weight", "inner.bias"))
        assert F.cross_entropy(F.linear(x, weight, bias), y).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: not enough memory")])  # fmt: skip
def test_out_of_memory_means_a_smaller_chunk(error, monkeypatch):
    model, loss_of = problem("convnet")
    optimizer, line, prev = probed(model, loss_of)
    expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
    before = everything(model, optimizer)
    chunks = []
    vmap = torch.vmap

    def vmap_that_fits_two(function, **kwargs):
        def batched(rows):
            chunks.append(len(rows[0]))
            if len(rows[0]) > 2:
                raise error
            return vmap(function, **kwargs)(rows)

        return batched

    monkeypatch.setattr(torch, "vmap", vmap_that_fits_two)
    losses = Stacked().losses(model, line, FACTORS_5, lambda: loss_of(model))
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-5, atol=1e-6)
    assert chunks == [2, 5, 3, 2, 2, 1]
    assert_same(before, everything(model, optimizer))


def test_out_of_memory_at_one_candidate(monkeypatch):
    model, loss_of = problem("mlp")
    optimizer, line, prev = probed(model, loss_of)
    before = everything(model, optimizer)

    def vmap_that_fits_none(function, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "vmap", vmap_that_fits_none)
    with pytest.raises(EvaluatorError, match="out of memory"):
        Stacked().losses(model, line, FACTORS_5, lambda: loss_of(model))
    assert_same(before, everything(model, optimizer))
    with pytest.warns(UserWarning, match="out of memory"):
        losses = Auto().losses(model, line, FACTORS_5, lambda: loss_of(model))
    assert losses.tolist() == losses_of_copies(model, prev, FACTORS_5, loss_of)


@pytest.mark.parametrize("evaluator", sorted(EVALUATORS))
@pytest.mark.parametrize("inside", [True, False], ids=["in-closure", "around-step"])
def test_autocast_never_serves_a_stale_candidate(evaluator, inside):
    model, plain = problem("mlp")

    def loss_of(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(model)

    _, line, prev = probed(model, loss_of)
    expected = losses_of_copies(model, prev, FACTORS_5, loss_of)
    assert len(set(expected)) == len(FACTORS_5)
    chosen = resolve_evaluator(evaluator)
    if inside:
        losses = chosen.losses(model, line, FACTORS_5, lambda: loss_of(model))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain(model)  # the cache now holds casts of the live weights
            losses = chosen.losses(model, line, FACTORS_5, lambda: plain(model))
            after = plain(model)
        assert after.item() == loss_of(model).item()
    tolerance = {"rtol": 0.0, "atol": 0.0} if evaluator in ("inplace", "streamed") else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(losses.tolist(), expected, **tolerance)


def test_losses_that_are_not_finite_are_reported():
    model = nn.ParameterList([nn.Parameter(torch.tensor([1.0]))])
    line = StepLine({model[0]: torch.zeros(1)}, {}, window=1)
    losses = InPlace().losses(model, line, (2.0, 1.0), lambda: (1.5 - model[0].sum()).log())
    assert math.isnan(losses[0].item())
    assert losses[1].item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("evaluator", sorted(EVALUATORS))
@pytest.mark.parametrize(
    ("closure_of", "says"),
    [
        (lambda loss, model: None, r"returned None \(NoneType\), not a loss tensor"),
        (lambda loss, model: 0.5, r"returned 0.5 \(float\).*without .item"),
        (lambda loss, model: model[0].weight, r"shape \[16, 5\], not a scalar"),
        (lambda loss, model: (loss > 0).long(), "torch.int64 tensor"),
        (lambda loss, model: loss.backward(), "called backward"),
    ],
)
def test_bad_closure(evaluator, closure_of, says):
    model, loss_of = problem("mlp")
    optimizer, line, _ = probed(model, loss_of)
    before = everything(model, optimizer)
    with pytest.raises(ClosureError, match=says):
        resolve_evaluator(evaluator).losses(model, line, FACTORS_5, lambda: closure_of(loss_of(model), model))
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_closure_cannot_reach_the_gradients(set_to_none):
    model, loss_of = problem("mlp")
    optimizer, line, _ = probed(model, loss_of)
    before = everything(model, optimizer)

    def training_closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(ClosureError, match="called backward"):
        InPlace().losses(model, line, FACTORS_5, training_closure)
    assert_same(before, everything(model, optimizer))


class Careless(nn.Module):
    """Keeps what it should not, as models do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.hidden = torch.zeros(3)
        self.calls = 0
        self.register_buffer("lazy", None)
        self.register_buffer("mask", torch.ones(1).expand(3))

    def forward(self, x):
        y = self.inner(x) * self.mask + self.hidden
        self.hidden = torch.tanh(y).mean(0).detach()
        self.calls += 1
        self.lazy = y.detach()
        self.last = y.detach()
        self.eval()
        return y


@pytest.mark.parametrize("evaluator", sorted(EVALUATORS))
def test_attributes_of_modules_do_not_change(evaluator):
    model = Careless()
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    prev = {p: p.detach() + 0.1 for p in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    hidden = model.hidden
    weight = model.inner.weight

    def closure():
        if evaluator == "inplace":  # vmap refuses it
            weight.requires_grad_(False)
        return F.cross_entropy(model(x), y)

    resolve_evaluator(evaluator).losses(model, line, FACTORS_5, closure)
    assert model.hidden is hidden
    assert torch.equal(hidden, torch.zeros(3))
    assert (model.calls, model.lazy, model.training, hasattr(model, "last")) == (0, None, True, False)
    assert weight.requires_grad
    assert list(copy.deepcopy(model).state_dict()) == ["mask", "inner.weight", "inner.bias"]


class KeepsState(nn.Module):
    """Keeps what its forward changes in containers of all kinds."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.cache = [(torch.zeros(1), torch.zeros(1))]
        self.counts = collections.defaultdict(int)
        self.seen = set()
        self.nested = {"steps": {"done": []}}

    def forward(self, x):
        self.cache[0][1].add_(1)
        self.counts["forward"] += 1
        self.seen.add(len(self.seen))
        self.nested["steps"]["done"].append(1)
        return self.inner(x) * self.cache[0][1] * len(self.seen) * sum(self.nested["steps"]["done"])


@pytest.mark.parametrize("evaluator", sorted(EVALUATORS))
def test_state_in_containers_is_put_back(evaluator):
    model, x = KeepsState(), torch.randn(12, 5)
    prev = {p: p.detach() + 0.1 for p in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    losses = resolve_evaluator(evaluator).losses(model, line, (1.0, 1.0), lambda: model(x).square().mean())
    assert losses[0] == losses[1]
    assert model.cache[0][1] == 0
    assert (dict(model.counts), model.seen, model.nested) == ({}, set(), {"steps": {"done": []}})


class OutOfReach(nn.Module):
    """Uses its weight in one of the ways that a stand-in cannot take part in."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(5))
        self.view = self.weight.detach()
        self.inner = torch.jit.script(nn.Linear(5, 5)) if kind == "scripted" else nn.Linear(5, 5)

    def forward(self, x):
        if self.kind == "clamped":
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
        return self.inner(x) @ (self.view if self.kind == "view" else self.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("clamped", "changes parameter 'weight'"),
        ("view", "uses or changes them where no torch function is given them"),
        ("scripted", "uses or changes them where no torch function is given them"),
    ],
)
def test_weights_out_of_reach_are_noticed(kind, says):
    model, x = OutOfReach(kind), torch.randn(12, 5)
    prev = {p: p.detach() + 0.1 for p in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    for evaluator in (Streamed(), Stacked()):
        with pytest.raises(EvaluatorError, match=says):
            evaluator.losses(model, line, FACTORS_5, lambda: model(x).square().mean())
    with pytest.warns(UserWarning, match=says):
        losses = Auto().losses(model, line, FACTORS_5, lambda: model(x).square().mean())
    assert torch.equal(losses, InPlace().losses(model, line, FACTORS_5, lambda: model(x).square().mean()))


class Changing(nn.Module):
    """Its forward changes a parameter, but only where it is large; another one masks with the lowest number."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor([1.0, 0.9, 0.99]))
        self.mask = nn.Parameter(torch.tensor([0.0, torch.finfo(torch.float32).min, -0.0]))

    def forward(self, x):
        with torch.no_grad():
            if self.scale.max() > 1:
                self.scale.clamp_(max=1.0)
        return torch.distributions.Normal(self.inner(x), self.scale).log_prob(x[:, :3]) * self.mask.softmax(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("evaluator", sorted(EVALUATORS))
def test_live_weights_come_back_whatever_the_forward_does_to_them(evaluator):
    model, x = Changing(), torch.randn(12, 5)
    prev = {p: p.detach() * 0.99 for p in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    before = [p.detach().clone().view(torch.int32) for p in model.parameters()]
    with contextlib.suppress(EvaluatorError):
        resolve_evaluator(evaluator).losses(model, line, FACTORS_5, lambda: model(x).mean())
    after = [p.detach().view(torch.int32) for p in model.parameters()]
    assert all(map(torch.equal, before, after))


class TwoWays(nn.Module):
    """Takes another way later, through a part that no torch function is given."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(5, 1), torch.jit.trace(nn.Linear(5, 1), torch.randn(2, 5))])
        self.way = 0

    def forward(self, x):
        return self.heads[self.way](x)


@pytest.mark.parametrize("evaluator", ["stacked", "streamed"])
def test_losses_that_are_not_finite_show_nothing(evaluator):
    """As of a batch without labels; the evaluator is checked, and serves, once they are finite."""
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    chosen = resolve_evaluator(evaluator)
    for scale in (math.nan, math.inf):
        losses = chosen.losses(model, line, FACTORS_5, lambda scale=scale: loss_of(model) * scale)
        assert not losses.isfinite().any()
    expected = InPlace().losses(model, line, FACTORS_5, lambda: loss_of(model))
    torch.testing.assert_close(chosen.losses(model, line, FACTORS_5, lambda: loss_of(model)), expected)


@pytest.mark.parametrize("evaluator", ["stacked", "streamed"])
def test_an_evaluator_is_checked_where_a_step_began_that_was_far_too_long(evaluator):
    """There the loss is finite, and shows whether the evaluator serves."""
    model, _ = problem("mlp")
    x = torch.randn(6, 5)
    prev = {p: p.detach().clone() for p in model.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e25)
    now = [p.detach().clone() for p in model.parameters()]
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    losses = resolve_evaluator(evaluator).losses(model, line, [1.0, 0.0], lambda: model(x).square().mean())
    assert losses[0] == math.inf
    assert_same(now, [p.detach() for p in model.parameters()])
    with torch.no_grad():
        for parameter, before in prev.items():
            parameter.copy_(before)
    torch.testing.assert_close(losses[1], model(x).square().mean().detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("evaluator", ["stacked", "streamed"])
def test_another_way_through_the_model_is_checked_too(evaluator):
    model, x = TwoWays(), torch.randn(12, 5)
    prev = {p: p.detach() + 0.1 for p in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    chosen = resolve_evaluator(evaluator)
    chosen.losses(model, line, FACTORS_5, lambda: model(x).square().mean())
    model.way = 1
    for _ in range(2):
        with pytest.raises(EvaluatorError, match="replaced|where no torch function"):
            chosen.losses(model, line, FACTORS_5, lambda: model(x).square().mean())


def test_a_parameter_that_is_not_used_is_no_trouble():
    model = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    x = torch.randn(12, 5)
    prev = {p: p.detach() + 0.1 for p in model.parameters()}
    line = StepLine(prev, dict.fromkeys(prev, ""), window=1)
    expected = InPlace().losses(model, line, FACTORS_5, lambda: model[0](x).square().mean())
    assert torch.equal(Streamed().losses(model, line, FACTORS_5, lambda: model[0](x).square().mean()), expected)


def test_an_error_that_is_the_closures_own_does_not_end_batching():
    model, loss_of = problem("mlp")
    _, line, _ = probed(model, loss_of)
    auto, broken = resolve_evaluator("auto"), [False]

    def closure():
        if broken[0]:
            raise OSError("no data")
        return loss_of(model)

    auto.losses(model, line, FACTORS_5, closure)
    broken[0] = True
    with pytest.raises(OSError, match="no data"):
        auto.losses(model, line, FACTORS_5, closure)
    assert auto.name != "auto"


@pytest.mark.parametrize("held", [{"a": 1, "b": 2}, ["a", "b"], {"a", "b"}, collections.deque("ab")], ids=type)
def test_containers_of_modules_go_back(held):
    """Also where as many of the same objects are in them, in another order or under other names."""
    model = mlp()
    model.held, before = held, copy.deepcopy(held)

    def closure():
        if isinstance(held, dict):
            held["c"] = held.pop("b")
        elif isinstance(held, set):
            held.remove("a")
            held.add("c")
        else:
            held.reverse()
        return model[0].weight.sum()

    with Isolation(model) as isolation:
        for _ in range(2):
            isolation.run(closure)
            assert held == before
    assert model.held is held


def test_containers_that_only_grow_go_back():
    model = mlp()
    model[-1].last = []
    with Isolation(model) as isolation:
        isolation.run(lambda: model[-1].last.append(1) or model[0].weight.sum())
    assert model[-1].last == []


class Hiding(nn.Module):
    """Its parameters are in a module that it does not register."""

    def __init__(self):
        super().__init__()
        self.hidden = [mlp()]

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        return self.hidden[0].named_parameters(prefix, recurse, remove_duplicate)


def test_gradients_of_parameters_that_no_module_registers_are_out_of_reach():
    model = Hiding()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with Isolation(model):
        assert all(parameter.grad is None for parameter in parameters)
    assert all(parameter.grad is not None for parameter in parameters)


def test_isolation_runs_all_start_alike():
    with Isolation(mlp()) as isolation:
        runs = [isolation.run(lambda: torch.rand(()) + random.random() + numpy.random.rand()) for _ in range(3)]
    assert len({run.item() for run in runs}) == 1


def test_unknown_evaluators():
    names = "'auto', 'graphed', 'inplace', 'stacked', 'streamed'"
    with pytest.raises(ValueError, match=f"evaluator='fast' is not known: use one of {names}"):
        resolve_evaluator("fast")
    with pytest.raises(TypeError, match="evaluator=3"):
        resolve_evaluator(3)
    with pytest.raises(ValueError, match="max_memory=0"):
        Stacked(max_memory=0)


def test_what_a_model_warns_of_is_said_once():
    model = mlp()

    def loss_of(model):
        warnings.warn("of the model", stacklevel=1)
        return model(x).square().mean()

    x = torch.randn(12, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _, line, _ = probed(model, loss_of)
        evaluator = Streamed()
        for _ in range(3):
            evaluator.losses(model, line, FACTORS_5, lambda: loss_of(model))
    assert len(caught) == 1


def test_a_loss_in_memory_that_the_next_run_takes_again():
    """As compiled closures return it: where the closure does not hold it itself."""

    class Memory:
        out = torch.zeros((), dtype=torch.float64)

    model, x = nn.Linear(5, 3), torch.randn(12, 5)
    _, line, _ = probed(model, lambda model: model(x).square().mean())
    closure = lambda: Memory.out.copy_(model(x).square().mean().double())  # noqa: E731
    expected = InPlace().losses(model, line, FACTORS_5, lambda: model(x).square().mean().double())
    assert torch.equal(InPlace().losses(model, line, FACTORS_5, closure), expected)
    with pytest.raises(ClosureError, match="at the same weights"):
        check_repeatable(model, lambda: Memory.out.add_(1.0))
