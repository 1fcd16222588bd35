"""Losses that contain a gradient, as of physics-informed networks and gradient penalties, are evaluated right."""

import contextlib
import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autolr_fast import FACTORS_3, FACTORS_5, AutoLR, ClosureError, Rule
from autolr_fast._evaluators import EvaluatorError, resolve_evaluator

from .helpers import NAMED, assert_same, everything, losses_of_copies, parameters_of, sgd
from .test_evaluators import probed

pytestmark = pytest.mark.filterwarnings("ignore:AutoLR evaluates the candidates one after another")
EACH_STEP = {"calibration_steps": 0, "probe_every_steps": 1, "rule": Rule(FACTORS_5, window_steps=1)}


def net():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def physics(model, x):
    """The residual of du/dx + u = 0."""
    x = x.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope.sum(1, keepdim=True) + u).square().mean()


def of_a_leaf_outside(model, x):
    x.requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope.sum(1, keepdim=True) + u).square().mean()


def second_order(model, x):
    x = x.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (curvature - u).square().mean()


def penalised(model, x):
    return model(x).square().mean() + (physics(model, x) - 1).square()


def hooked(model, x):
    u = model(x)
    u.register_hook(lambda gradient: 2 * gradient)
    return u.square().mean()


def by_mode(model, x):
    """No error without gradients, and another loss."""
    loss = model(x).square().mean()
    return loss + 0.1 * physics(model, x) if torch.is_grad_enabled() else loss


LOSSES = [physics, of_a_leaf_outside, second_order, penalised, hooked]
# vmap takes no requires_grad_, and a hook sits on what depends on the parameters themselves.
REFUSED = {(loss_of, "stacked") for loss_of in LOSSES} | {(hooked, "streamed")}


def with_gradients(loss_of, x):
    return torch.enable_grad()(lambda model: loss_of(model, x).detach())


def start(evaluator="inplace", **options):
    model = net()
    optimizer = sgd(model, lr=0.05, momentum=0.9)
    return model, optimizer, AutoLR(optimizer, model, evaluator=evaluator, **{**EACH_STEP, **options})


def take_a_step(model, optimizer, scheduler, *, loss_of, way, evaluator):
    """Take a step whose probe sees the losses of copies, or is refused; return whether it is."""
    x, prev = torch.randn(12, 2), parameters_of(model)
    closure = lambda: loss_of(model, x)  # noqa: E731
    optimizer.zero_grad()
    (scheduler.loss(closure) if way == "loss" else closure()).backward()
    optimizer.step()
    left, refused = everything(model, optimizer), (loss_of, evaluator) in REFUSED
    with pytest.raises(EvaluatorError, match="'inplace' works") if refused else contextlib.nullcontext():
        scheduler.step(*([closure] if way == "step" else []))
    assert_same(left, everything(model, optimizer))
    if not refused:
        expected = losses_of_copies(model, prev, FACTORS_5, with_gradients(loss_of, x))
        assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-5)
    return refused


@pytest.mark.parametrize("evaluator", ["auto", *NAMED])
@pytest.mark.parametrize("way", ["loss", "step"])
@pytest.mark.parametrize("loss_of", LOSSES)
def test_losses_are_those_that_training_computes(loss_of, way, evaluator):
    model, optimizer, scheduler = start(evaluator)
    model.eval()  # no noise: both ways see one loss
    for step in (1, 2):
        refused = take_a_step(model, optimizer, scheduler, loss_of=loss_of, way=way, evaluator=evaluator)
        if not refused:
            assert scheduler.last_probe.step == step
            assert evaluator in ("auto", scheduler.last_probe.evaluator)


@pytest.mark.parametrize("calibration", [0, 3])
@pytest.mark.parametrize("which", ["last", "all"])
def test_micro_batches_with_their_own_noise(which, calibration):
    model, optimizer, scheduler = start(micro_batches=which, calibration_steps=calibration)
    for step in (1, 2):
        optimizer.zero_grad()
        for _ in range(3):
            x = torch.randn(12, 2)
            scheduler.loss(lambda x=x: physics(model, x)).backward()
        optimizer.step()
        scheduler.step()
        assert scheduler.last_probe.step == step


@pytest.mark.parametrize("window", [1, 2])
def test_a_loss_that_is_another_without_gradients_is_evaluated_with_them(window):
    """Without an error; also where the loss before the line is not known."""
    rule = Rule(FACTORS_3, window_steps=window)
    model, optimizer, scheduler = start(rule=rule, probe_every_steps=window)
    model.eval()
    for step in range(1, 5):
        x = torch.randn(12, 2)
        if step % window == 1 % window:
            prev = parameters_of(model)
        optimizer.zero_grad()
        scheduler.loss(lambda x=x: by_mode(model, x)).backward()
        optimizer.step()
        scheduler.step()
        if step % window == 0:
            expected = losses_of_copies(model, prev, FACTORS_3, with_gradients(by_mode, x))
            assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-6)
            without = losses_of_copies(model, prev, FACTORS_3, lambda model, x=x: by_mode(model, x))
            assert scheduler.last_probe.losses.tolist() != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize("evaluator", ["auto", *NAMED])
@pytest.mark.parametrize("way", ["loss", "step"])
@pytest.mark.parametrize("every", [2, 3])
def test_a_penalty_now_and_then(every, way, evaluator):
    """As in WGAN-GP and with lazy regularisation: the closure is of another kind at a later probe."""
    model, optimizer, scheduler = start(evaluator, max_heat=math.inf)
    model.eval()
    for step in range(1, 7):
        loss_of = penalised if step % every == 0 else lambda model, x: model(x).square().mean()
        take_a_step(model, optimizer, scheduler, loss_of=loss_of, way=way, evaluator=evaluator)


def adapted(model, x):
    """The loss after a step of its own: it differentiates the parameters."""
    inner = model(x).square().mean()
    gradients = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
    weights = {
        name: parameter - 0.1 * gradient
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True)
    }
    return torch.func.functional_call(model, weights, x).square().mean()


@pytest.mark.parametrize("evaluator", ["auto", "inplace", "streamed", "stacked"])
def test_a_loss_that_differentiates_the_parameters(evaluator):
    """Stand-ins are no parameters: where they serve, or are refused, the loss is right or there is none."""
    model, optimizer, scheduler = start(evaluator)
    model.eval()
    x, prev = torch.randn(12, 2), parameters_of(model)
    scheduler.loss(lambda: adapted(model, x)).backward()
    optimizer.step()
    left = everything(model, optimizer)
    refused = evaluator in ("streamed", "stacked")
    says = f"{evaluator!r} cannot serve Sequential: the loss differentiates its parameters.*'inplace' works"
    with pytest.raises(EvaluatorError, match=says) if refused else contextlib.nullcontext():
        scheduler.step()
    assert_same(left, everything(model, optimizer))
    if not refused:
        expected = losses_of_copies(model, prev, FACTORS_5, with_gradients(adapted, x))
        assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_fresh_gradient_of_a_loss_that_contains_one():
    model, optimizer, scheduler = start(rule=Rule(FACTORS_3, direction="gradient"))
    model.eval()
    x, lr = torch.randn(12, 2), 0.05
    scheduler.loss(lambda: physics(model, x)).backward()
    optimizer.step()
    scheduler.step()
    gradients = torch.autograd.grad(physics(model, x), list(model.parameters()))
    expected = []
    for factor in FACTORS_3:
        moved = {
            name: p - factor * lr * g for (name, p), g in zip(parameters_of(model).items(), gradients, strict=True)
        }
        expected += losses_of_copies(model, moved, [0.0], with_gradients(physics, x))
    assert scheduler.last_probe.losses.tolist() == pytest.approx(expected, rel=1e-5)


def calls_backward(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss


def takes_its_gradient_from_a_leaf(model, x):
    x.requires_grad_()
    u = model(x)
    u.sum().backward(inputs=[x], create_graph=True)
    return (x.grad + u).square().mean()


def calls_backward_with_gradients(model, x):
    with torch.enable_grad():
        return calls_backward(model, x)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("evaluator", ["auto", *NAMED])
@pytest.mark.parametrize("way", ["loss", "step"])
@pytest.mark.parametrize("loss_of", [calls_backward, takes_its_gradient_from_a_leaf, calls_backward_with_gradients])
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_closure_that_calls_backward_is_refused(loss_of, way, evaluator, later):
    """Also at a later probe; gradients are put back, also those of a batch."""
    model, optimizer, scheduler = start(evaluator)
    if later:
        scheduler.loss(lambda: model(torch.ones(2, 2)).square().mean()).backward()
        optimizer.step()
        scheduler.step()
    x = torch.randn(12, 2)
    closure = lambda: loss_of(model, x)  # noqa: E731
    model(x).square().mean().backward()
    if way == "loss":
        scheduler.remember(closure)
    optimizer.step()
    left = everything(model, optimizer)
    with pytest.raises(ClosureError, match=r"called backward\(\).*keep zero_grad"):
        scheduler.step(*([closure] if way == "step" else []))
    assert_same(left, everything(model, optimizer))
    assert x.grad is None


@pytest.mark.parametrize("way", ["loss", "step"])
def test_no_graph_outlives_its_candidate(way):
    """Nor its micro-batch."""
    model, optimizer, scheduler = start(micro_batches="all")
    x, alive, ran = torch.randn(12, 2), [], []

    def closure():
        ran.append(sum(ref() is not None for ref in alive))
        leaf = x.clone().requires_grad_()
        alive.append(weakref.ref(leaf))  # the graph keeps it
        return physics(model, leaf)

    for _ in range(2):
        (scheduler.loss(closure) if way == "loss" else closure()).backward()
    optimizer.step()
    gc.disable()
    try:
        scheduler.step(*([closure] if way == "step" else []))
    finally:
        gc.enable()
    assert len(ran) > len(FACTORS_5)
    assert not any(ran)


@pytest.mark.parametrize("window", [1, 2])
def test_gradients_are_off_for_a_loss_that_does_not_need_them(window):
    """But for one run, where the loss before the line is not known."""
    model, optimizer, scheduler = start(
        rule=Rule(FACTORS_3, window_steps=window), probe_every_steps=window, max_heat=math.inf
    )
    modes = []

    def closure():
        modes.append(torch.is_grad_enabled())
        return model(x).square().mean()

    for _ in range(2 * window):
        x = torch.randn(12, 2)
        optimizer.zero_grad()
        scheduler.loss(closure).backward()
        optimizer.step()
        scheduler.step()
    in_training = 2 * window
    assert sum(modes) == in_training + (window == 2)
    assert len(modes) - sum(modes) == 2 * len(FACTORS_3) + (1 if window == 1 else 2)


def test_an_evaluator_alone_says_what_is_wrong():
    model, x = net(), torch.randn(12, 2)
    _, line, _ = probed(model, lambda model: model(x).square().mean())
    for name in NAMED:
        with pytest.raises(ClosureError, match="called backward"):
            resolve_evaluator(name).losses(model, line, FACTORS_3, lambda: physics(model, x))


@pytest.fixture
def alone_in_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.cpu
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.parametrize("held_outside", [False, True])
@pytest.mark.parametrize("loss_of", [by_mode, hooked])
def test_under_ddp(loss_of, held_outside):
    """Which waits for a backward after each forward with gradients on, unless it is told not to."""
    losses, waits = [], []

    def loss_and_mode(called, x):
        if isinstance(called, DistributedDataParallel) and torch.is_grad_enabled():
            waits.append(called.require_backward_grad_sync)
        return loss_of(called, x)

    for wraps in (False, True):
        torch.manual_seed(3)
        model = net().eval()
        called = DistributedDataParallel(model) if wraps else model
        optimizer = sgd(model, lr=0.05)
        scheduler = AutoLR(optimizer, model if held_outside else called, evaluator="inplace", **EACH_STEP)
        for _ in range(3):
            x = torch.randn(12, 2)
            optimizer.zero_grad()
            scheduler.loss(lambda called=called, x=x: loss_and_mode(called, x)).backward()
            optimizer.step()
            scheduler.step()
            losses.append(scheduler.last_probe.losses.tolist())
    assert losses[:3] == losses[3:]
    assert sum(waits) == 3  # those of training
    assert len(waits) > 3 * len(FACTORS_5)
