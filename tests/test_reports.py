"""Situations in which users of other schedulers, rate finders and optimizers reported trouble.

Docstrings name public reports of the situation, where one was found.
"""

import contextlib
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from autolr_fast import AutoLR, ClosureError, Rule

from .helpers import assert_same, everything, mlp, parameters_of

PROBED = {"calibration_steps": 0, "probe_every_steps": 2, "probe_until_fraction": 1.0, "total_steps": 60}


class Recorded:
    """Trains without AutoLR, at rates that were written down."""

    def __init__(self, optimizers, rates):
        self.optimizers, self.rates = optimizers, iter(rates)

    def loss(self, closure):
        return closure()

    def step(self):
        for optimizer, rates in zip(self.optimizers, next(self.rates), strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def several(optimizers):
    return optimizers if isinstance(optimizers, list) else [optimizers]


def assert_only_rates_change(train, *, probes=4, **options):
    """Compare a training with the same one without AutoLR, at the rates that AutoLR found: bit for bit.

    Args:
        train: takes what makes a scheduler of optimizers and model, and returns the tensors that it ends with.
        probes: made at least.
        **options: of AutoLR.

    Returns:
        The scheduler.
    """
    made, rates = [], []

    def with_autolr(optimizers, model):
        scheduler = AutoLR(optimizers, model, **{**PROBED, **options})
        step = scheduler.step

        def noted():
            step()
            rates.append([[group["lr"] for group in each.param_groups] for each in several(optimizers)])

        scheduler.step = noted
        made.append(scheduler)
        return scheduler

    torch.manual_seed(1)
    found = train(with_autolr)
    torch.manual_seed(1)
    assert_same(found, train(lambda optimizers, model: Recorded(several(optimizers), rates)))
    assert len(made[0].history) >= probes
    assert made[0].level[0] != made[0].history[0].lr_before[0]
    return made[0]


def labels(count=8):
    return torch.randint(3, (count,))


def batch():
    return torch.randn(8, 5), labels()


def adamw(model, lr=0.01):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def trained(make, iterate, *, optimizer=adamw, steps=16):
    """Return a training whose iterations are ``iterate(step, model, optimizer, scheduler, kept)``."""

    def train(schedule):
        model, kept = make(), {}
        own = optimizer(model)
        scheduler = schedule(own, model)
        for step in range(steps):
            iterate(step, model, own, scheduler, kept)
        others = [each for each in kept.values() if isinstance(each, nn.Module)]
        return [
            *everything(model, own),
            *(tensor.clone() for other in others for tensor in [*other.parameters(), *other.buffers()]),
        ]

    return train


def plainly(model, optimizer, scheduler, x, y):
    optimizer.zero_grad()
    scheduler.loss(lambda: F.cross_entropy(model(x), y)).backward()
    optimizer.step()
    scheduler.step()


def normed():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


# What surrounds a step, and is not noticed


def with_averages(step, model, optimizer, scheduler, kept):
    """Average the weights after ``scheduler.step``, and teach by the average.

    Swapped orders of averages and schedulers: pytorch/pytorch 46583, mosaicml/composer 581.
    """
    average = kept.setdefault(
        "average", AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    )
    x, y = batch()
    optimizer.zero_grad()
    scheduler.loss(lambda: F.cross_entropy(model(x), y) + F.mse_loss(model(x), average(x).detach())).backward()
    optimizer.step()
    scheduler.step()
    average.update_parameters(model)
    if step == 12:
        update_bn([torch.randn(8, 5) for _ in range(3)], average)


def with_surgery(step, model, optimizer, scheduler, kept):
    """Two losses, a backward each, gradients that are made of both and clipped twice.

    Gradient surgery around other optimizers: tianheyu927/PCGrad 4, WeiChengTseng/Pytorch-PCGrad 5.
    """
    (x, y), z, losses = batch(), torch.randn(8), []
    parameters = list(model.parameters())

    def closure():
        losses[:] = [F.cross_entropy(model(x), y), F.mse_loss(model(x)[:, 0], z)]
        return sum(losses)

    scheduler.loss(closure)
    gradients = []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append([parameter.grad.clone() for parameter in parameters])
    along = sum((one * other).sum() for one, other in zip(*gradients, strict=True)).clamp(max=0)
    length = sum(other.square().sum() for other in gradients[1])
    for parameter, one, other in zip(parameters, *gradients, strict=True):
        parameter.grad = one + other - along / length * other
    nn.utils.clip_grad_norm_(parameters, 1.0)
    nn.utils.clip_grad_value_(parameters, 0.5)
    optimizer.step()
    scheduler.step()


def in_windows(step, model, optimizer, scheduler, kept):
    """Accumulate three batches a step; the last window of an epoch of eight has two.

    Last windows that are lost or counted twice: tracel-ai/burn 5695, huggingface/accelerate 963.
    """
    x, y = batch()
    (scheduler.loss(lambda: F.cross_entropy(model(x), y)) / 3).backward()
    if step % 8 in (2, 5, 7):
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def growing(step, model, optimizer, scheduler, kept):
    """Batches grow, losses are sums, and label smoothing sets in.

    Schedules that take the batch for granted: huggingface/transformers 43718.
    """
    x, y = torch.randn(4 + step, 5), labels(4 + step)
    smoothing = 0.1 if step > 8 else 0.0
    optimizer.zero_grad()
    scheduler.loss(lambda: F.cross_entropy(model(x), y, label_smoothing=smoothing, reduction="sum")).backward()
    optimizer.step()
    scheduler.step()


def pruned(step, model, optimizer, scheduler, kept):
    """Weights are pruned while training runs: the parameter gets another name."""
    if step in (5, 11):
        prune.l1_unstructured(model[0], "weight", amount=0.3)
    plainly(model, optimizer, scheduler, *batch())


def freezing(set_to_none):
    def iterate(step, model, optimizer, scheduler, kept):
        """Layers are frozen and unfrozen by their flags, BatchNorm stays in eval mode, gradients are kept at zero.

        Frozen layers that move: open-mmlab/OpenPCDet 845; pytorch/pytorch 18404.
        """
        if step == 0:
            model[0].requires_grad_(False)
        if step in (4, 9):
            model[0].requires_grad_(step == 4)
        model.train()
        model[1].eval()
        x, y = batch()
        optimizer.zero_grad(set_to_none=set_to_none)
        scheduler.loss(lambda: F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        scheduler.step()

    return iterate


SURROUNDINGS = {
    "averages": (normed, with_averages, 16),
    "surgery": (normed, with_surgery, 16),
    "windows": (normed, in_windows, 40),
    "growing": (mlp, growing, 16),
    "pruned": (mlp, pruned, 16),
    "freezing": (normed, freezing(set_to_none=True), 16),
    "freezing, zero gradients": (normed, freezing(set_to_none=False), 16),
}


@pytest.mark.parametrize("evaluator", ["inplace", "streamed", "stacked"])
@pytest.mark.parametrize("case", sorted(SURROUNDINGS))
def test_nothing_but_the_rate_changes(case, evaluator):
    make, iterate, steps = SURROUNDINGS[case]
    assert_only_rates_change(trained(make, iterate, steps=steps), evaluator=evaluator)


class ActNorm(nn.Module):
    """Sets its parameters at its first forward, by the batch."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(5))
        self.register_buffer("is_set", torch.tensor(0))

    def forward(self, x):
        if self.training and not self.is_set:
            self.shift.data = -x.detach().mean(0)
            self.is_set.fill_(1)
        return x + self.shift


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(5, 8), nn.Linear(8, 3), reentrant
        self.middle = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))


class Odd(nn.Module):
    """Has an empty parameter, tied ones, some in a list, and some without a use."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.same = self.inner
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.same(x) + self.listed[0] * self.listed[1] + self.empty.sum()


def with_head(first):
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 3))


def lazy():
    return with_head(nn.LazyLinear(8))


# name -> model; the reports are named below.
MODULES = {
    "actnorm": lambda: nn.Sequential(ActNorm(), nn.Linear(5, 3)),
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "checkpoint, reentrant": lambda: Checkpointed(reentrant=True),
    "data parallel": lambda: nn.DataParallel(mlp()),
    "odd": Odd,
    "lazy": lazy,
    "orthogonal": lambda: with_head(parametrizations.orthogonal(nn.Linear(5, 8))),
    "spectral norm": lambda: with_head(parametrizations.spectral_norm(nn.Linear(5, 8))),
    "spectral norm, hook": lambda: with_head(nn.utils.spectral_norm(nn.Linear(5, 8))),
    "weight norm": lambda: with_head(parametrizations.weight_norm(nn.Linear(5, 8))),
    "weight norm, hook": lambda: with_head(nn.utils.weight_norm(nn.Linear(5, 8))),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a checkpoint without gradients
@pytest.mark.parametrize("evaluator", ["inplace", "streamed"])
@pytest.mark.parametrize("case", sorted(MODULES))
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
def test_modules_that_others_cannot_copy_or_that_change_at_a_forward(case, evaluator):
    """Weight norm that cannot be copied: pytorch/pytorch 28594, mosaicml/composer 864.

    Parameters that are set by the first batch: karpathy/deep-vector-quantization 5. Checkpoints without gradients
    are warned of by torch: Lyken17/pytorch-memonger 4.
    """

    def iterate(step, model, optimizer, scheduler, kept):
        plainly(model, optimizer, scheduler, *batch())

    assert_only_rates_change(trained(MODULES[case], iterate), evaluator=evaluator)


@pytest.mark.parametrize("window", [1, 2])
def test_an_embedding_that_renormalizes_its_rows_in_the_forward(window):
    """The rows of a batch are written in place at each forward: pytorch/pytorch 26596."""

    def make():
        return nn.Sequential(nn.Embedding(50, 8, max_norm=1.0, padding_idx=0), nn.Flatten(), nn.Linear(32, 3))

    def iterate(step, model, optimizer, scheduler, kept):
        plainly(model, optimizer, scheduler, torch.randint(50, (8, 4)), labels())

    def optimizer(model):
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    assert_only_rates_change(
        trained(make, iterate, optimizer=optimizer), evaluator="inplace", rule=Rule(window_steps=window)
    )


@pytest.mark.parametrize("evaluator", ["inplace", "streamed", "stacked"])
def test_sparse_embeddings_have_an_optimizer_of_their_own(evaluator):
    """SparseAdam beside AdamW: pytorch/pytorch 18404, 1285."""

    def train(schedule):
        model = nn.Sequential(nn.Embedding(50, 8, sparse=True, padding_idx=0), nn.Flatten(), nn.Linear(32, 3))
        optimizers = [torch.optim.SparseAdam(model[0].parameters(), lr=0.01), adamw(model[2])]
        scheduler = schedule(optimizers, model)
        for _ in range(16):
            x = torch.randint(50, (8, 4))
            y = x[:, 0] // 17  # drawn labels cannot be learned, and steps would be lost
            for optimizer in optimizers:
                optimizer.zero_grad()
            scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y)).backward()
            for optimizer in optimizers:
                optimizer.step()
            scheduler.step()
        return [tensor for optimizer in optimizers for tensor in everything(model, optimizer)]

    assert_only_rates_change(train, evaluator=evaluator, rule=Rule(), max_heat=math.inf)


@pytest.mark.parametrize("alone", [(), (7, 9)])
def test_one_scaler_for_two_optimizers(alone):
    """Steps that a scaler skips: pytorch/pytorch 44511, huggingface/transformers 11106, Lightning 21339.

    The scale grows every five steps. A step that one optimizer alone skips is told, and not probed.
    """

    def train(schedule):
        model = mlp()
        optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), adamw(model[2])]
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**8, growth_interval=5)
        scheduler = schedule(optimizers, model)
        for step in range(20):
            x, y = batch()
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale(scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y))).backward()
            if step in (4, 12, *alone):
                model[0].weight.grad[0, 0] = torch.inf
            if step in (4, 12):
                model[2].weight.grad[0, 0] = torch.inf
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        return [tensor for optimizer in optimizers for tensor in everything(model, optimizer)]

    said = "SGD did not step in an iteration in which AdamW did"
    with pytest.warns(match=said) if alone else contextlib.nullcontext():
        scheduler = assert_only_rates_change(train)
    assert scheduler.last_epoch == 18 - len(alone)


@pytest.mark.parametrize("is_known", [True, False])
def test_learned_weights_of_losses_belong_to_the_model(is_known):
    """Weights that no optimizer moves: ifzhang/FairMOT 19. Those that AutoLR cannot find are an error."""
    weights = nn.ParameterList([torch.zeros(2)])

    def train(schedule):
        model = mlp()
        with torch.no_grad():
            weights[0].zero_()
        weights.zero_grad()
        groups = [{"params": model.parameters()}, {"params": weights.parameters(), "lr": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        scheduler = schedule(optimizer, nn.ModuleList([model, weights]) if is_known else model)
        for _ in range(16):
            (x, y), z = batch(), torch.randn(8)

            def closure(x=x, y=y, z=z):
                scores = model(x)
                losses = torch.stack([F.cross_entropy(scores, y), F.mse_loss(scores[:, 0], z)])
                return ((-weights[0]).exp() * losses + weights[0]).sum()

            optimizer.zero_grad()
            scheduler.loss(closure).backward()
            optimizer.step()
            scheduler.step()
        return [*everything(model, optimizer), *everything(weights, optimizer)]

    says = r"param_groups\[1\]\['params'\]\[0\] \(shape \[2\]\) is not a parameter of the model .*ModuleList"
    with contextlib.nullcontext() if is_known else pytest.raises(ValueError, match=says):
        assert_only_rates_change(train)


# Calibrated trainings, in other words


def task(seed=5, steps=40, size=32):
    """The batches of a task that a small network learns."""
    generator = torch.Generator("cpu").manual_seed(3)
    inputs = torch.randn(512, 5, generator=generator, device="cpu")
    classes = (inputs @ torch.randn(5, 3, generator=generator, device="cpu")).argmax(1)
    device = torch.get_default_device()
    generator.manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(512, (size,), generator=generator, device="cpu")
        yield inputs[chosen].to(device), classes[chosen].to(device)


def a_network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))


def loss_of_all(model):
    ((x, y),) = task(steps=1, size=4096)
    with torch.no_grad():
        return F.cross_entropy(model.float()(x), y).item()


def an_autolr(optimizer, model, **options):
    return AutoLR(optimizer, model, **{"total_steps": 80, "evaluator": "inplace", **options})


def ordinary(model, optimizer, scheduler, batches=None):
    losses = []
    for x, y in task() if batches is None else batches:
        optimizer.zero_grad()
        loss = scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y))
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def an_ordinary_training(lr=0.01):
    model = a_network()
    optimizer = adamw(model, lr)
    return ordinary(model, optimizer, an_autolr(optimizer, model))


def test_the_loss_may_come_in_a_closure_of_the_optimizer():
    """Lightning trains in ``optimizer.step(closure)``: Lightning-AI/pytorch-lightning 6147, 18268."""
    model, losses = a_network(), []
    optimizer = adamw(model)
    scheduler = an_autolr(optimizer, model)
    for x, y in task():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = scheduler.loss(lambda: F.cross_entropy(model(x), y))
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert losses == an_ordinary_training()


def test_optimizers_may_step_in_backward():
    """One optimizer a parameter, and no gradient left: meta-pytorch/torchtune 1833, pytorch/torchtitan 705."""
    model, losses = a_network(), []
    optimizers = {parameter: torch.optim.AdamW([parameter], lr=0.01) for parameter in model.parameters()}
    scheduler = an_autolr(list(optimizers.values()), model)

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for x, y in task():
        loss = scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y))
        loss.backward()
        scheduler.step()
        losses.append(loss.item())
    assert losses == an_ordinary_training()


def test_copies_of_an_optimizer_are_not_its_steps():
    """A copy may be tried out, as rate finders do: davidtvs/pytorch-lr-finder 11, fastai/fastai 3185."""
    model = a_network()
    optimizer = adamw(model)
    scheduler = an_autolr(optimizer, model)
    assert scheduler.get_last_lr() == scheduler.get_lr() == scheduler.level == [0.01]
    assert scheduler.last_probe is None
    ordinary(model, optimizer, scheduler, task(steps=3))
    twin = copy.deepcopy(optimizer)
    for parameter in (each for group in twin.param_groups for each in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    twin.step()
    scheduler.step()
    assert scheduler.last_epoch == 3


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_the_loss_may_have_another_dtype(kind):
    """The loss of a half precision network, or of one that sums in double precision."""
    model = a_network()
    optimizer = adamw(model)
    scheduler = an_autolr(optimizer, model)
    for x, y in task():
        optimizer.zero_grad()
        scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y).to(kind)).backward()
        optimizer.step()
        scheduler.step()
    assert loss_of_all(model) < 0.35


class Adam8(torch.optim.Optimizer):
    """Keeps its two averages in blocks of 64 bytes with a scale each, as 8-bit optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @staticmethod
    def packed(values):
        blocks = F.pad(values.flatten(), (0, -values.numel() % 64)).view(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
        return (blocks / scales * 127).round().add(128).to(torch.uint8), scales

    @staticmethod
    def unpacked(packed, shape):
        codes, scales = packed
        return ((codes.float() - 128) / 127 * scales).flatten()[: shape.numel()].view(shape)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["state1"], state["absmax1"] = self.packed(torch.zeros_like(parameter))
                    state["state2"], state["absmax2"] = self.packed(torch.zeros_like(parameter))
                state["step"] += 1
                first = self.unpacked((state["state1"], state["absmax1"]), parameter.shape)
                second = self.unpacked((state["state2"], state["absmax2"]), parameter.shape).clamp_min(0)
                first.lerp_(parameter.grad, 0.1)
                second.lerp_(parameter.grad.square(), 0.001)
                state["state1"], state["absmax1"] = self.packed(first)
                state["state2"], state["absmax2"] = self.packed(second)
                first /= 1 - 0.9 ** state["step"]
                second /= 1 - 0.999 ** state["step"]
                parameter.sub_(group["lr"] * first / (second.sqrt() + 1e-3))


def test_a_state_of_bytes_is_none_of_the_weights():
    """8-bit states whose scales went wrong: kohya-ss/sd-scripts 523, bitsandbytes 152 and 1647."""
    ends = []
    for lr in (1e-6, 1e-3, 10.0):
        model = a_network()
        optimizer = Adam8(model.parameters(), lr)
        ordinary(model, optimizer, an_autolr(optimizer, model))
        ends.append(loss_of_all(model))
    assert max(ends) < 0.3
    assert max(ends) - min(ends) < 0.05


@pytest.mark.parametrize("at", [0, 1, 9])
@pytest.mark.parametrize("where", ["loss", "probe", "between"])
def test_a_training_goes_on_after_an_interrupt(where, at):
    """Interrupts that lose rates or weights: havakv/torchtuples 1, speechbrain/speechbrain 1824."""
    model = a_network()
    optimizer = adamw(model, lr=3.0)
    scheduler = an_autolr(optimizer, model)
    is_told, steps = False, 60
    for step, (x, y) in enumerate(task(steps=steps)):
        calls = []

        def closure(x=x, y=y, calls=calls, step=step):
            calls.append(1)
            if step == at and len(calls) == {"loss": 1, "probe": 3, "between": 0}[where]:
                raise KeyboardInterrupt
            return F.cross_entropy(model(x), y)

        with warnings.catch_warnings(record=True) as told, contextlib.suppress(KeyboardInterrupt):
            warnings.simplefilter("always")
            optimizer.zero_grad()
            scheduler.loss(closure).backward()
            optimizer.step()
            if where == "between" and step == at:
                raise KeyboardInterrupt
            scheduler.step()
        is_told = is_told or any("a probe was due" in str(each.message) for each in told)
        scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert scheduler.last_epoch == steps - (where == "loss")
    assert is_told == (where == "between")
    assert loss_of_all(model) < 0.35


@pytest.mark.parametrize("order", ["0123", "0102", "0120"])
def test_a_closure_that_draws_its_batch_is_refused(order):
    """Rate finders that use up a loader, or never move on in it: davidtvs/pytorch-lr-finder 11.

    Two batches may have the same loss by chance.
    """
    model, batches = a_network(), list(task(steps=20))
    loader = iter([batches[int(each)] for each in order] + batches[4:])
    optimizer = adamw(model, lr=1e-6)
    scheduler = an_autolr(optimizer, model)

    def closure():
        x, y = next(loader)
        return F.cross_entropy(model(x), y)

    scheduler.loss(closure).backward()
    optimizer.step()
    with pytest.raises(ClosureError, match=r"all candidates must see one batch: take it outside"):
        scheduler.step()


def test_a_loop_that_sets_the_rate_is_told():
    """The rate is set anew in each iteration: NVIDIA/tacotron2 445."""
    model = a_network()
    optimizer = adamw(model)
    scheduler = an_autolr(optimizer, model)
    with pytest.warns(match=r"the lr of optimizer.param_groups\[0\] was 1e-06 .* remove the other"):
        for x, y in task():
            for group in optimizer.param_groups:
                group["lr"] = 1e-6
            ordinary(model, optimizer, scheduler, [(x, y)])
    assert scheduler.get_last_lr()[0] > 1e-3


def test_a_loader_without_batches_is_told():
    """Lengths that come out as zero: bghira/SimpleTuner 1172."""
    model = a_network()
    with pytest.raises(ValueError, match="total_steps=0: expected 1 or more optimizer steps"):
        AutoLR(adamw(model), model, total_steps=5 * len([]))


class Wrapped(torch.optim.Optimizer):
    """Derives from an optimizer without its ``__init__``, as that of Opacus."""

    def __init__(self, original):
        self.original_optimizer = original

    param_groups = property(lambda self: self.original_optimizer.param_groups)
    state = property(lambda self: self.original_optimizer.state)
    defaults = property(lambda self: self.original_optimizer.defaults)

    def step(self, closure=None):
        return self.original_optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.original_optimizer.zero_grad(set_to_none)


def test_the_optimizer_inside_a_wrapper_without_hooks_is_the_one_to_give():
    """Schedulers of wrapped optimizers that do nothing: microsoft/dp-transformers 43, meta-pytorch/opacus 322."""
    model = a_network()
    inside = adamw(model)
    assert ordinary(model, Wrapped(inside), an_autolr(inside, model)) == an_ordinary_training()


def test_a_wrapper_without_hooks_is_followed_or_told():
    """As above, with the wrapper itself given."""
    model = a_network()
    outside = Wrapped(adamw(model))
    try:
        losses = ordinary(model, outside, an_autolr(outside, model))
    except (TypeError, ValueError) as error:
        assert "original_optimizer" in str(error)  # noqa: PT017
    else:
        assert losses == an_ordinary_training()


# Compiled steps


@pytest.mark.usefixtures("every_probe")
def test_a_compiled_step_of_the_optimizer_is_seen():
    """Schedulers and compiled optimizers: pytorch/pytorch 130467, 120934."""
    model = a_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    scheduler = an_autolr(optimizer, model)
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, backend="eager")
    losses = []
    for x, y in task(steps=12):
        optimizer.zero_grad()
        loss = scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x), y))
        loss.backward()
        compiled()
        scheduler.step()
        losses.append(loss.item())
    assert losses == pytest.approx(an_ordinary_training()[:12], rel=1e-3)
    assert scheduler.last_epoch == scheduler.last_probe.step == 12


def test_a_step_that_was_compiled_before_is_refused_with_the_remedy():
    """``'function' object has no attribute '__func__'``: meta-pytorch/torchtune 2263, 2681."""
    model = a_network()
    optimizer = adamw(model)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    with pytest.raises((TypeError, ValueError), match="step.*(before|after)"):
        an_autolr(optimizer, model)


# What has to be told


@pytest.mark.parametrize("in_proportion", [False, True])
def test_scales_of_groups_that_nothing_reads_are_told(in_proportion):
    """Layer-wise decay without effect: huggingface/pytorch-image-models 2532."""
    model = a_network()
    scales = {0: 0.01, 2: 1.0}
    groups = [
        {"params": model[n].parameters(), "lr_scale": scale, "lr": 0.01 * (scale if in_proportion else 1)}
        for n, scale in scales.items()
    ]
    optimizer = torch.optim.AdamW(groups)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        an_autolr(optimizer, model)
    ratio = optimizer.param_groups[0]["lr"] / optimizer.param_groups[1]["lr"]
    assert ratio == pytest.approx(0.01) or any("lr_scale" in str(each.message) for each in told)
    assert not (in_proportion and told)


class Masters(torch.optim.Optimizer):
    """Steps copies of the weights that it keeps elsewhere, and writes them to the parameters."""

    def __init__(self, parameters, lr, where):
        super().__init__(parameters, {"lr": lr})
        self.where, self.masters = where, {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.masters if self.where == "attribute" else self.state[parameter]
                key = parameter if self.where == "attribute" else "master"
                flat = kept.setdefault(key, parameter.detach().flatten().double())
                flat -= group["lr"] * parameter.grad.flatten()
                parameter.copy_(flat.view_as(parameter))


@pytest.mark.parametrize("lr", [1e-3, 10.0])
@pytest.mark.parametrize("where", ["state", "attribute"])
def test_copies_of_weights_of_another_shape_move_along_or_are_told(where, lr):
    """Masters that overwrite what was loaded: NVIDIA/apex 42, facebookresearch/pytext 966."""
    model = a_network()
    optimizer = Masters(model.parameters(), lr, where)
    scheduler = an_autolr(optimizer, model)
    (x, y), *_ = task()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):  # of the same batch
            before = parameters_of(model)
            ordinary(model, optimizer, scheduler, [(x, y)])
    assert scheduler.history[0].retaken is not None
    ended = parameters_of(model)
    steps = [(ended[name] - before[name]).norm().item() for name in ended]
    rate = scheduler.last_probe.lr_before[0]
    gradients = [parameter.grad.norm().item() for parameter in model.parameters()]
    follows = steps == pytest.approx([rate * gradient for gradient in gradients], rel=0.05)
    assert follows or any("weights" in str(each.message) for each in told)


def reset_by_copy(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(3 * torch.randn_like(parameter))


def reset_by_loading(model):
    model.load_state_dict({name: 3 * torch.randn_like(each) for name, each in model.state_dict().items()})


@pytest.mark.parametrize("at", [1, 3, 9])
@pytest.mark.parametrize("reset", [reset_by_copy, reset_by_loading])
def test_weights_that_the_user_sets_in_the_first_steps_stay(reset, at):
    """Codes or layers that are set anew in training: exitudio/MMM 11, openai/jukebox 231, Biohub/esm 85."""
    model = a_network()
    optimizer = adamw(model, lr=1e-3)
    scheduler = an_autolr(optimizer, model)
    batches = list(task())
    ordinary(model, optimizer, scheduler, batches[:at])
    reset(model)
    left = parameters_of(model)
    with pytest.warns(match=r"changed between scheduler.step\(\) and the next optimizer.step\(\)"):
        ordinary(model, optimizer, scheduler, batches[at : at + 1])
    longest = max((each - left[name]).abs().max() for name, each in model.state_dict().items())
    assert longest <= 3 * max(scheduler.last_probe.lr_before[0], scheduler.last_probe.lr_after[0])


@pytest.mark.parametrize("kind", ["clamp", "renorm"])
def test_weights_that_the_user_limits_before_the_schedulers_step_are_within_or_that_is_told(kind):
    """Weights are clipped after the optimizer: martinarjovsky/WassersteinGAN 50, jiamings/wgan 2."""
    model = a_network()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-5)
    scheduler = an_autolr(optimizer, model)
    (x, y), *_ = task()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.zero_grad()
        scheduler.loss(lambda: F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                if kind == "clamp":
                    parameter.clamp_(-0.05, 0.05)
                elif parameter.ndim == 2:
                    parameter.copy_(parameter.renorm(2, 0, 0.3))
        scheduler.step()
    most = max(
        parameter.abs().max() / 0.05 if kind == "clamp" else parameter.norm(dim=1).max() / 0.3
        for parameter in model.parameters()
        if kind == "clamp" or parameter.ndim == 2
    )
    assert most <= 1.0001 or told


def test_a_state_of_another_optimizer_is_told():
    """A run goes on with another optimizer: unit8co/darts 1501."""
    model = a_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = an_autolr(optimizer, model)
    ordinary(model, optimizer, scheduler)
    other = an_autolr(adamw(model), model)
    before = other.get_last_lr()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            other.load_state_dict(scheduler.state_dict())
        except ValueError as error:
            assert "SGD" in str(error)  # noqa: PT017
            assert "AdamW" in str(error)  # noqa: PT017
            assert other.get_last_lr() == before
        else:
            assert any("SGD" in str(each.message) and "AdamW" in str(each.message) for each in told)


def test_an_optimizer_that_was_replaced_is_told():
    """A new optimizer each epoch: pytorch/tutorials 61, speediedan/finetuning-scheduler 6."""
    model = a_network()
    optimizer = adamw(model)
    scheduler = an_autolr(optimizer, model)
    ordinary(model, optimizer, scheduler)
    with pytest.raises(RuntimeError, match="saw no step of AdamW"):
        ordinary(model, torch.optim.SGD(model.parameters(), lr=1.0), scheduler, task(seed=6, steps=60))


class FindsItsOwn(torch.optim.Optimizer):
    """Multiplies its lr by an estimate that grows from 1e-6, as D-Adaptation and Prodigy do."""

    def __init__(self, parameters, lr=1.0):
        super().__init__(parameters, {"lr": lr, "d": 1e-6, "growth_rate": float("inf"), "sums": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        moved, sums = 0.0, 0.0
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["sum"] = torch.zeros_like(parameter)
            state["sum"] += group["d"] * group["lr"] * parameter.grad
            moved += (state["sum"] * parameter.grad).sum().item()
            sums += state["sum"].abs().sum().item()
        group["sums"] += group["d"] * group["lr"] * moved
        group["d"] = max(group["d"], group["sums"] / (sums + 1e-30))
        for parameter in group["params"]:
            parameter.sub_(group["d"] * group["lr"] * parameter.grad.sign())


def test_optimizers_that_find_their_own_rate_are_refused():
    """Rates that multiply an estimate: konstmish/prodigy 3 and 37, kohya-ss/sd-scripts 1787."""
    model = a_network()
    with pytest.raises(ValueError, match="optimizer=FindsItsOwn"):
        an_autolr(FindsItsOwn(model.parameters()), model)


def test_a_calibration_in_which_nothing_moved_begins_later_or_is_told():
    """A backbone that is frozen for the first steps: speediedan/finetuning-scheduler 6."""
    model = a_network().requires_grad_(False)
    scale = torch.ones(3, requires_grad=True)
    optimizer, other = adamw(model, lr=1e-7), torch.optim.SGD([scale], lr=0.1)
    scheduler = an_autolr(optimizer, model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, (x, y) in enumerate(task()):
            if step == 25:
                model.requires_grad_(True)
            optimizer.zero_grad()
            other.zero_grad()
            scheduler.loss(lambda x=x, y=y: F.cross_entropy(model(x) * scale, y)).backward()
            optimizer.step()
            other.step()
            scheduler.step()
    assert told or scheduler.get_last_lr()[0] > 1e-4


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_layers_that_are_unfrozen_do_not_lose_the_training(kind, in_groups):
    """Unfreezing by flags makes gradients explode: Lightning-AI/pytorch-lightning 450.

    Where layers are added as a group instead, the loss rises by a third.
    """
    model = a_network()
    model[0].requires_grad_(False)
    layers = [{"params": model[n].parameters()} for n in (0, 2)]
    parameters = layers if in_groups else model.parameters()
    if kind == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scheduler = an_autolr(optimizer, model, total_steps=200)
    ordinary(model, optimizer, scheduler)
    before = loss_of_all(model)
    model[0].requires_grad_(True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        worst = max(
            ordinary(model, optimizer, scheduler, [pair]) and loss_of_all(model) for pair in task(seed=6, steps=5)
        )
    assert worst < 3 * before or told
