"""Trainings drawn at random, and what must hold after each of their steps, computed apart from the package."""

import copy
import functools
import io
import math
import random
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from autolr_fast import FACTORS_2, FACTORS_3, AutoLR, Rule, reference
from autolr_fast._evaluators import EvaluatorError

from .helpers import MEAN_AT, between, moved_by_heat, random_states, set_random_states

HIDDEN, CLASSES, BATCH = 8, 3, 6
LATER = 2  # parts of a network that are frozen at first


class Net(nn.Module):
    """A body of one kind, parts that are frozen at first, and a head."""

    def __init__(self, kind, dropout=0.0):
        super().__init__()
        self.kind = kind
        self.calls = 0  # an attribute that each forward changes
        if kind == "mlp":
            self.body = nn.Sequential(nn.Linear(5, HIDDEN), nn.Tanh())
        elif kind == "norm":
            self.body = nn.Sequential(nn.Linear(5, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU())
        elif kind == "weight-norm":
            self.body = nn.utils.parametrizations.weight_norm(nn.Linear(5, HIDDEN))
        else:
            self.body = nn.Embedding(11, HIDDEN, sparse=kind == "sparse")
        if kind == "gru":
            self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.later = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(LATER))
        self.later.requires_grad_(False)
        self.head = None if kind == "tied" else nn.Linear(HIDDEN, CLASSES)

    @property
    def reads_words(self):
        return isinstance(self.body, nn.Embedding)

    def forward(self, x):
        self.calls += 1
        hidden = self.body(x)
        if self.kind == "gru":
            hidden = self.gru(hidden)[0][:, -1]
        elif self.reads_words:
            hidden = hidden.mean(1)
        hidden = self.dropout(hidden)
        for part in self.later:
            hidden = hidden + part(hidden)
        return self.head(hidden) if self.head else hidden @ self.body.weight.T


# kind -> the evaluators that serve it
KINDS = {
    "mlp": ("auto", "inplace", "streamed", "stacked"),
    "norm": ("auto", "inplace", "streamed", "stacked"),
    "weight-norm": ("auto", "inplace", "streamed", "stacked"),
    "tied": ("auto", "inplace", "streamed", "stacked"),
    "gru": ("auto", "inplace", "streamed"),
    "sparse": ("auto", "inplace", "streamed"),
}


@dataclass(frozen=True)
class OptimizerSpec:
    name: str
    options: dict
    lrs: tuple  # of each group
    has_tensor_lr: bool = False

    def build(self, groups):
        """Return the optimizer of so many groups of parameters; those that are empty are left out."""
        lrs = self.lrs[: len(groups)]
        given = [{"params": group, "lr": self.lr(lr)} for group, lr in zip(groups, lrs, strict=True) if group]
        return getattr(torch.optim, self.name)(given, **self.options)

    def lr(self, lr):
        return torch.tensor(lr, dtype=torch.float64) if self.has_tensor_lr else lr


@dataclass(frozen=True)
class Spec:
    """One training."""

    seed: int
    kind: str
    is_double: bool
    dropout: float
    loss: str
    frozen: str
    maximize: bool
    optimizers: tuple
    arguments: dict
    rule: Rule | None

    @property
    def direction(self):
        return self.rule.direction if self.rule else "step"

    @property
    def span(self):
        """Steps from where averages begin to the probe; 0 where there are none."""
        every, is_limited = self.arguments["probe_every_steps"], math.isfinite(self.arguments["max_heat"])
        return 1 + min(10, every) if every and is_limited and self.direction == "step" else 0

    def is_close(self, step):
        calibrated = self.arguments["calibration_steps"]
        return step <= (20 if calibrated is None else calibrated)


BETAS = st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
OWN_OPTIONS = {
    "Adam": {"amsgrad": st.booleans(), "betas": BETAS},
    "AdamW": {"amsgrad": st.booleans(), "betas": BETAS},
    "NAdam": {"decoupled_weight_decay": st.booleans()},
    "RMSprop": {"centered": st.booleans(), "momentum": st.sampled_from([0.0, 0.9])},
    "Adagrad": {
        "lr_decay": st.sampled_from([0.0, 0.1]),
        "initial_accumulator_value": st.sampled_from([0.0, 0.1]),
    },
    "Adadelta": {"rho": st.sampled_from([0.9, 0.5])},
    "Muon": {"nesterov": st.booleans(), "adjust_lr_fn": st.sampled_from([None, "match_rms_adamw"])},
}


@st.composite
def optimizer_options(draw, name, maximize):
    """Options that suit an optimizer, and whether its lr is a tensor."""
    some = functools.partial(draw, st.booleans())
    options = {key: draw(values) for key, values in OWN_OPTIONS.get(name, {}).items()}
    if name == "SGD":
        options["momentum"] = draw(st.sampled_from([0.0, 0.5, 0.9]))
        if options["momentum"] and some():
            options["nesterov"] = True
        elif options["momentum"]:
            options["dampening"] = draw(st.sampled_from([0.0, 0.3]))
    if name != "SparseAdam":
        options["weight_decay"] = draw(st.sampled_from([0.0, 0.01, 1.0]))
    if maximize:
        options["maximize"] = True
    # torch's fused SGD leaves its momentum uninitialised if a scaler skips its first step.
    implementations = [None, "foreach"] if options.get("momentum") else [None, "foreach", "fused"]
    implementation = draw(st.sampled_from(implementations))
    if implementation:
        options[implementation] = True
    tensor_lr = some()
    if not _works(name, tuple(options.items()), tensor_lr):
        options.pop(implementation, None)
        tensor_lr = tensor_lr and _works(name, tuple(options.items()), tensor_lr)
    return options, tensor_lr


@functools.cache
def _works(name, options, tensor_lr):
    """Whether torch's optimizer takes these options together, by itself."""
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2).to_sparse() if name == "SparseAdam" else torch.ones(2, 2)
    try:
        optimizer = OptimizerSpec(name, dict(options), (0.1,), tensor_lr).build([[parameter]])
        optimizer.step()
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


ANY = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adafactor")
RATES = st.integers(-60, 10).map(lambda tenth: 10.0 ** (tenth / 10))


RULES = st.builds(
    Rule,
    factors=st.sampled_from([FACTORS_2, FACTORS_3, (3.0, 0.9, 1 / 3)]),
    window_steps=st.sampled_from([1, (1,), (2,), (1, 3), (4, 2)]),
    direction=st.sampled_from(["step"] * 5 + ["gradient"]),
)


@st.composite
def specs(draw):
    """A training: network, optimizers, arguments of AutoLR."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    if kind == "sparse":
        names = ("SparseAdam", draw(st.sampled_from(ANY)))
    else:
        names = draw(
            st.tuples(st.sampled_from(ANY))
            | st.tuples(st.just("Muon"), st.sampled_from(ANY))
            | st.tuples(st.sampled_from(ANY), st.sampled_from(ANY))
        )
    maximize = "Muon" not in names and draw(st.integers(0, 4)) == 0
    start = draw(RATES)
    optimizers = []
    for name in names:
        options, tensor_lr = draw(optimizer_options(name, maximize))
        ratios = draw(st.lists(st.sampled_from([1.0, 0.1, 10.0, 1e-3, 0.0]), min_size=1, max_size=3))
        ratios.sort(key=lambda ratio: ratio == 0.0)  # last, where there may be no parameters left
        ratios[0] = ratios[0] or 1.0
        highest = 1.0 if name == "Adafactor" else math.inf  # it does not follow higher ones
        lrs = tuple(min(start * ratio, highest) for ratio in ratios)
        optimizers.append(OptimizerSpec(name, options, lrs, tensor_lr))
    rates = [lr for each in optimizers for lr in each.lrs if lr]
    wide = st.sampled_from([1.0, 3.0, 100.0, 1e6])
    limits = draw(st.none() | st.tuples(wide, wide))
    total = draw(st.none() | st.integers(4, 40))
    rule = draw(st.none() | RULES)
    arguments = {
        "total_steps": total,
        "anneal": draw(st.sampled_from(["cosine", "linear"])),
        "probe_every_steps": draw(st.none() | st.integers(1, 6)),
        "probe_until_fraction": draw(st.sampled_from([0.5, 1.0, 0.0])),
        "calibration_steps": draw(st.none() | st.integers(0, 8)),
        "max_heat": draw(st.sampled_from([0.2, 1e-3, 100.0, *([math.inf] if rule else [])])),
        "evaluator": draw(st.sampled_from(KINDS[kind])),
        "micro_batches": draw(st.sampled_from(["last", "all"])),
        **({"lr_limits": (min(rates) / limits[0], max(rates) * limits[1])} if limits else {}),
    }
    return Spec(
        seed=draw(st.integers(0, 2**16)),
        kind=kind,
        is_double=draw(st.booleans()) and "NAdam" not in names,  # torch loads its products in another dtype
        dropout=draw(st.sampled_from([0.0, 0.3])),
        loss=draw(st.sampled_from(["cross-entropy", "mse"])),
        frozen="" if kind == "tied" else draw(st.sampled_from(["", "", "outside", "inside"])),
        maximize=maximize,
        optimizers=tuple(optimizers),
        arguments=arguments,
        rule=rule,
    )


@dataclass(frozen=True)
class Iteration:
    """What happens in one iteration of the training.

    Attributes:
        seed: of the batches.
        how: the loss comes to AutoLR: by ``loss``, ``remember`` or ``step(closure)``, or not at all (``none``).
        micro_batches: before the optimizers step.
        added: a number that the loss is off by, such as NaN.
        scaler: ``used``, or it skips the step of all optimizers (``skips``) or of the first (``skips one``).
        raises_at: the call of the closure that raises: 0 in training, or of that number in the probe.
        autocast: whether the loss is computed in bfloat16.
        evaluates_between: whether the model is in eval mode when ``scheduler.step`` is called.
        kind_of_closure: that a user may write.
        keeps_zeros: whether gradients are zeroed in place.
    """

    seed: int
    how: str = "loss"
    micro_batches: int = 1
    added: float = 0.0
    scaler: str = ""
    raises_at: int | None = None
    autocast: bool = False
    evaluates_between: bool = False
    kind_of_closure: str = "lambda"
    keeps_zeros: bool = False


# What an evaluator asked for by name says of a batch whose loss is not finite, of a dead network, of any exception.
TOLERATED = ("shows nothing", "does not show", "BoomError")


class BoomError(Exception):
    """What a closure raises here."""


class Fuse:
    """Counts the calls of closures, and has one of them raise."""

    def __init__(self):
        self.left = math.inf

    def burn(self):
        self.left -= 1
        if self.left == 0:
            raise BoomError


@dataclass
class Part:
    """A micro-batch, and where everything stood before its loss was computed."""

    loss_of: object
    streams: list
    modes: list
    has_autocast: bool


@dataclass
class Streams:
    """Random streams of a training's own."""

    states: list

    @classmethod
    def seeded(cls, seed):
        now = random_states()
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        streams = cls(random_states())
        set_random_states(now)
        return streams

    def __enter__(self):
        self._outside = random_states()
        set_random_states(self.states)

    def __exit__(self, *exc_info):
        self.states = random_states()
        set_random_states(self._outside)


class Training:
    """A model, its optimizers and an AutoLR, and what a test remembers of them.

    Args:
        spec: the training.
        added: param groups that are added at once: index of the optimizer, of the part, and lr.
    """

    def __init__(self, spec, added=()):
        self.spec = spec
        self.streams = Streams.seeded(spec.seed)
        with self.streams:
            self.model = Net(spec.kind, spec.dropout)
        self.model.to(torch.float64 if spec.is_double else torch.float32)
        self.optimizers = self._optimizers()
        self.added = []
        self.initial_groups = sum(len(optimizer.param_groups) for optimizer in self.optimizers)
        self.scheduler = AutoLR(
            self.optimizers if len(self.optimizers) > 1 else self.optimizers[0],
            self.model,
            rule=spec.rule,
            **spec.arguments,
        )
        self.steps = 0
        self.seen = 0  # of them, by ``scheduler.step``
        self.before = {}  # optimizer steps -> the parameters before the next one, by name
        self.told = []
        self.erred = False  # whether a loss that is not finite kept an evaluator from being checked
        for group in added:
            self.add_group(*group)

    def _optimizers(self):
        spec, model = self.spec, self.model
        first = next(model.body.parameters())
        if spec.frozen:
            first.requires_grad_(False)
        own = [p for p in model.parameters() if p.requires_grad or (p is first and spec.frozen == "inside")]
        chosen, *others = spec.optimizers
        takes = {"SparseAdam": lambda p: p is first, "Muon": lambda p: p.ndim == 2}.get(chosen.name)
        parts = [own]
        if others:
            takes = takes or (lambda p: p.ndim != 2 or p is first)
            parts = [[p for p in own if takes(p)], [p for p in own if not takes(p)]]
        built = []
        for each, part in zip(spec.optimizers, parts, strict=True):
            count = len(each.lrs)
            groups = [part[index::count] for index in range(count)]
            if part:
                built.append(each.build(groups))
        return built

    @property
    def parameters(self):
        return dict(self.model.named_parameters())

    def spec_of(self, optimizer):
        return next(each for each in self.spec.optimizers if each.name == type(optimizer).__name__)

    def add_group(self, optimizer, part, lr):
        """Unfreeze a part of the model, and train it."""
        module = self.model.later[part].requires_grad_()
        optim = self.optimizers[optimizer]
        optim.add_param_group({"params": list(module.parameters()), "lr": self.spec_of(optim).lr(lr)})
        self.added.append((optimizer, part, lr))

    def _moving(self):
        """Return the parameters that the next step may move."""
        held = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        return [p for p in held if p.requires_grad or p.grad is not None]

    def pending(self):
        """Return the names of the parameters in groups whose rate AutoLR does not know yet."""
        known = len(self.scheduler.state_dict()["level"]["base_lrs"]) - self.initial_groups
        return {f"later.{part}.weight" for _, part, _ in self.added[known:]}

    # Batches, and closures over them.

    def batch(self, seed):
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float64 if self.spec.is_double else torch.float32
        if self.model.reads_words:
            x = torch.randint(11, (BATCH, 4), generator=generator)
        else:
            x = torch.randn(BATCH, 5, generator=generator, dtype=dtype)
        return x, torch.randint(CLASSES, (BATCH,), generator=generator)

    def loss_on(self, seed, added):
        """Return what computes the loss of a model on a batch, with noise of all streams."""
        x, y = self.batch(seed)
        kind, sign = self.spec.loss, -1 if self.spec.maximize else 1

        def loss_of(model):
            out = model(x)
            scale = 1 + 0.1 * random.random() + 0.1 * float(numpy.random.random())
            out = out * scale + 0.01 * torch.randn(BATCH, 1, dtype=x.dtype if x.is_floating_point() else None)
            target = F.one_hot(y, out.shape[1]).to(out.dtype)
            loss = F.cross_entropy(out, y) if kind == "cross-entropy" else 3 * F.mse_loss(out, target)
            return sign * loss + added

        return loss_of

    def closure(self, loss_of, fuse, kind):
        """Return a closure of one of the kinds that users write."""
        model = self.model

        def run():
            fuse.burn()
            return loss_of(model)

        if kind == "partial":
            return functools.partial(_burn_and_run, fuse, loss_of, model)
        if kind == "method":
            return _Bound(fuse, loss_of, model).loss
        return (lambda: run()) if kind == "lambda" else run

    # One iteration.

    def iterate(self, it):
        """Train for an iteration, and check all that must hold."""
        with self.streams, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._iterate(it)
        self._hear(caught)

    def _hear(self, caught):
        told = [str(each.message) for each in caught if each.category is UserWarning]
        self.told += [message for message in told if "AutoLR" in message]
        assert len(set(self.told)) == len(self.told), f"told more than once: {self.told}"

    def _iterate(self, it):
        fuse, parts = Fuse(), []
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not it.keeps_zeros)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=bool(it.scaler))
        autocast = torch.autocast("cpu", torch.bfloat16) if it.autocast else nullcontext()
        for index in range(it.micro_batches):
            loss_of = self.loss_on(it.seed + index, it.added)
            closure = self.closure(loss_of, fuse, it.kind_of_closure)
            parts.append(Part(_within(autocast, loss_of), random_states(), modes_of(self.model), it.autocast))
            if it.raises_at == 0 and index == 0:
                fuse.left = 1
            try:
                with autocast:
                    loss = self._loss(it.how, closure)
            except BoomError:
                return
            loss = loss.float() if it.autocast else loss
            scaler.scale(loss / it.micro_batches).backward()
        moving = {id(p) for p in self._moving()}
        self.before[self.steps] = {
            name: value for name, value in values_of(self.model).items() if id(self.parameters[name]) in moving
        }
        self.before = {step: kept for step, kept in self.before.items() if step > self.steps - 12}
        stepped = self._step_optimizers(scaler, it.scaler)
        self.steps += stepped
        modes = modes_of(self.model)
        if it.evaluates_between:
            self.model.eval()
        arguments = ()
        if it.how == "step":
            arguments = (_within(autocast, closure),)
            parts = [Part(parts[-1].loss_of, random_states(), modes_of(self.model), it.autocast)]
        fuse.left = it.raises_at or math.inf
        done = self._step_scheduler(arguments, parts if it.how != "none" else [], stepped)
        fuse.left = math.inf
        if not done and it.how == "step":  # whoever catches it may try again
            self._step_scheduler(arguments, parts, stepped)
        self._set_modes(modes)

    def _loss(self, how, closure):
        if how == "loss":
            return self.scheduler.loss(closure)
        if how == "remember":
            self.scheduler.remember(closure)
        return closure()

    def _step_optimizers(self, scaler, how):
        """Step, and return whether all did."""
        skips = self.optimizers if how == "skips" else self.optimizers[:1] if how == "skips one" else []
        stepped = True
        for optimizer in self.optimizers:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if not gradients:  # which a scaler complains of
                optimizer.step()
                continue
            if optimizer in skips:
                gradients[0].mul_(math.inf)
            values = [each._values() if each.is_sparse else each for each in gradients]
            if scaler.is_enabled() and not all(each.isfinite().all() for each in values):
                stepped = False
            scaler.step(optimizer)
        return stepped

    def step_scheduler(self, times=1.0):
        """Call ``scheduler.step()`` once more, at which nothing happens but that a rate that changed is put back.

        Args:
            times: what something else multiplies a rate by before.
        """
        with self.streams, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before, rates, probes = everything(self), self.rates(), list(self.scheduler.history)
            joins = self.pending()
            group = self.optimizers[0].param_groups[0]
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(times)
            else:
                group["lr"] *= times
            self.scheduler.step()
            check_same(before, everything(self))
            total = self.spec.arguments["total_steps"]
            is_over = total is not None and self.scheduler.last_epoch >= total  # others may write then
            if is_over:
                group["lr"] = rates[0] if not isinstance(group["lr"], torch.Tensor) else group["lr"].fill_(rates[0])
            # A closure had raised, and annealing waited; or a group gets what the others have.
            assert self.rates() == rates or self.seen < self.steps or joins
            self.seen = self.steps
            assert all(one is other for one, other in zip(self.scheduler.history, probes, strict=True))
        self._hear(caught)

    def rates(self):
        return [float(group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups]

    def _step_scheduler(self, arguments, parts, stepped):
        """Step, check what came of it, and return whether no closure raised."""
        scheduler = self.scheduler
        self.ended = values_of(self.model)  # where the optimizers' steps ended
        before, rates, probes = everything(self), self.rates(), list(scheduler.history)
        state = scheduler.state_dict()
        pending = joins = self.pending()
        if not (state["calibration"]["found"] and state["calibration_steps"]):
            pending = set()  # they are searched with all others, or not at all
        try:
            scheduler.step(*arguments)
        except (BoomError, EvaluatorError) as error:
            if not (isinstance(error, BoomError) or any(each in str(error) for each in TOLERATED)):
                raise
            self.erred = not isinstance(error, BoomError)
            check_same(before, everything(self))
            assert self.rates() == rates or joins
            assert all(one is other for one, other in zip(scheduler.history, probes, strict=True))
            return False
        self.seen = self.steps
        has_probed = scheduler.last_probe is not (probes[-1] if probes else None)
        retaken = scheduler.last_probe.retaken if has_probed else None
        after, moves = everything(self), set()
        if retaken is not None:
            moves = {f"parameter {name}" for name in self.parameters}
            if not self.spec.is_close(self.steps) and not is_search(scheduler.last_probe):
                assert not any(optimizer.state for optimizer in self.optimizers)  # it begins anew
                moves |= {key for key in {**before, **after} if key.startswith(("state of optimizer", "buffers"))}
            elif retaken == 0.0 and not any(
                optimizer.state for optimizer in self.optimizers
            ):  # a first step, undone
                moves |= {key for key in before if key.startswith("state of optimizer")}
        check_same(before, after, besides=moves)
        assert scheduler.history[: len(probes)] == probes
        assert len(scheduler.history) == len(probes) + has_probed
        # A closure that comes later will do for the step before, if that was not probed.
        if not pending and (stepped or not arguments):
            assert has_probed == (bool(parts) and stepped and self._window() is not None)
        if has_probed:
            check_probe(self, parts, pending)
            assert joins or [float(lr) for lr in scheduler.last_probe.lr_before] == ordered(self, rates)
            if not pending and not is_search(scheduler.last_probe):
                check_move(self, state["level"], parts)
        check_rates(self)
        return True

    def _window(self):
        """Return the window of the probe that is due now, as the docs have it."""
        given, step = self.spec.arguments, self.steps
        every, total = (given[key] for key in ("probe_every_steps", "total_steps"))
        windows = self.spec.rule.window_steps if self.spec.rule else 1
        windows = (windows,) if isinstance(windows, int) else windows
        until = math.inf if total is None else given["probe_until_fraction"] * total
        if step == 0:
            return None
        if self.spec.is_close(step):
            window = windows[(step - 1) % len(windows)]
        elif every and step % every == 0 and step <= until:
            if self.spec.rule is None:  # the heat alone
                return self.spec.span - 1 if step >= self.spec.span else None
            window = windows[step // every % len(windows)]
        else:
            return None
        return 0 if self.spec.direction == "gradient" else min(window, step)

    def _set_modes(self, modes):
        for module, mode in zip(self.model.modules(), modes, strict=True):
            module.training = mode

    # Saved and loaded.

    def saved(self):
        """Return what a file gives back that is loaded with ``weights_only``."""
        for parameter in self.model.parameters():
            parameter.grad = None
        file = io.BytesIO()
        states = [self.model.state_dict(), [each.state_dict() for each in self.optimizers]]
        torch.save([*states, self.scheduler.state_dict()], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def remembered(self):
        """Return what a test remembers of the training, apart from what is saved."""
        before = {step: {name: each.clone() for name, each in kept.items()} for step, kept in self.before.items()}
        flags = [parameter.requires_grad for parameter in self.model.parameters()]
        return (
            (self.steps, self.seen),
            before,
            list(self.streams.states),
            self.model.calls,
            modes_of(self.model),
            flags,
        )

    def load(self, saved, remembered):
        """Go on from what was saved, and from what was remembered then."""
        model, optimizers, scheduler = copy.deepcopy(saved)
        self.model.load_state_dict(model)
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(scheduler)
        (self.steps, self.seen), before, states, self.model.calls, modes, flags = remembered
        self.before = {step: {name: each.clone() for name, each in kept.items()} for step, kept in before.items()}
        self.streams.states = list(states)
        self._set_modes(modes)
        for parameter, flag in zip(self.model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


@dataclass
class _Bound:
    fuse: Fuse
    loss_of: object
    model: nn.Module = field(repr=False)

    def loss(self):
        return _burn_and_run(self.fuse, self.loss_of, self.model)


def _burn_and_run(fuse, loss_of, model):
    fuse.burn()
    return loss_of(model)


def _within(context, function):
    def run(*arguments):
        with context:
            return function(*arguments)

    return run


def modes_of(model):
    return [module.training for module in model.modules()]


def values_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# What must be the same.


def flat(value, path=""):
    """Return the leaves of nested containers, by path; tensors and numbers as bits."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        if tensor.is_sparse:
            return {**flat(tensor._indices(), path + ".indices"), **flat(tensor._values(), path + ".values")}
        bits = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {path: (str(tensor.dtype), tuple(tensor.shape), bits)}
    if isinstance(value, dict):
        return {k: leaf for key, each in value.items() for k, leaf in flat(each, f"{path}[{key!r}]").items()}
    if isinstance(value, (list, tuple)):
        found = {k: leaf for index, each in enumerate(value) for k, leaf in flat(each, f"{path}[{index}]").items()}
        return {f"{path} type": type(value).__name__, f"{path} length": len(value), **found}
    if isinstance(value, numpy.ndarray):
        return {path: value.tobytes()}
    return {path: (type(value).__name__, repr(value))}


_MAY_CHANGE = ("params", "lr", "initial_lr", "differentiable")  # the last by torch, for groups after a load


def everything(training, of_another=False):
    """Return all that a probe must not touch.

    Args:
        of_another: whether it is compared with that of another training: less gradients and addresses.
    """
    model, optimizers = training.model, training.optimizers
    found = {}
    for name, parameter in model.named_parameters():
        found |= flat(parameter, f"parameter {name}")
        found[f"requires_grad {name}"] = parameter.requires_grad
        if not of_another:
            found[f"address of {name}"] = parameter.data_ptr()
            found[f"gradient of {name}"] = id(parameter.grad)
            found |= flat(parameter.grad, f"gradient {name}")
    found |= flat(dict(model.named_buffers()), "buffers")
    found |= flat(modes_of(model), "modes")
    found["calls"] = model.calls
    for index, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        found |= flat(state["state"], f"state of optimizer {index}")
        for number, group in enumerate(optimizer.param_groups):
            rest = {key: value for key, value in group.items() if key not in _MAY_CHANGE}
            found |= flat(rest, f"group {index}.{number}")
            if isinstance(group["lr"], torch.Tensor) and not of_another:
                found[f"the lr of group {index}.{number}"] = id(group["lr"])
    found |= flat(random_states(), "streams")
    return found


def check_same(before, after, besides=()):
    """Check that nothing differs but what may."""
    differ = [key for key in {**before, **after} if before.get(key) != after.get(key) and key not in besides]
    assert not differ, f"changed: {differ}"


def check_alike(one, other):
    """Check that two trainings are the same bit for bit, what AutoLR knows included."""
    with one.streams:
        first = everything(one, of_another=True)
    with other.streams:
        second = everything(other, of_another=True)
    check_same(first, second)
    assert one.rates() == other.rates()
    check_same(flat(one.scheduler.state_dict()), flat(other.scheduler.state_dict()))


# What a probe must have seen.


def check_told(training, probe):
    """Check that a probe fits together, and fits the rates."""
    count = len(probe.factors)
    assert probe.step == training.steps
    assert len(probe.losses) == len(probe.weights) == count
    assert [float(lr) for lr in probe.lr_after] == ordered(training, training.rates())
    assert [float(each) for each in probe.level_after] == training.scheduler.level
    assert type(probe).from_dict(probe.to_dict()).to_dict().keys() == probe.to_dict().keys()
    total = float(probe.weights.sum())
    assert math.isclose(total, 1.0, rel_tol=1e-9) or total == 0.0


def check_probe(training, parts, pending):
    """Compare a probe with the losses of deep copies, and where the parameters are with what it says."""
    spec, probe, steps = training.spec, training.scheduler.last_probe, training.steps
    count = len(probe.factors)
    check_told(training, probe)
    if spec.direction == "gradient":
        assert probe.window == 0
        assert probe.retaken is None
        return
    searched, is_close = is_search(probe), spec.is_close(steps)
    now, averages = training.ended, spec.rule is None and not (searched or is_close)
    begin = training.before[steps - (spec.span if averages else probe.window)]
    end = training.before[steps - 1] if averages else now
    along = (pending if searched and pending else end.keys()) & begin.keys()
    if averages:
        assert probe.factors == (MEAN_AT, 1.0)
    elif is_close and not searched:
        assert probe.factors == (1.0, 0.0)
    if not all(torch.isfinite(each).all() for values in (begin, end, now) for each in values.values()):
        return

    def at(factor, begin=begin, end=end):
        moved = {name: between(begin[name], end[name], factor) if name in along else now[name] for name in now}
        return moved, mean_loss(training, moved, parts)

    is_streamed_gru = (probe.evaluator, spec.kind) == ("streamed", "gru")  # rounds as its memory is aligned
    is_batched = probe.evaluator == "stacked" or is_streamed_gru
    eps = 1e-9 if spec.is_double else 0.1 if parts[-1].has_autocast else 2e-4
    looked = list(zip(probe.factors, probe.losses.tolist(), strict=True))
    for factor, loss in looked[:: max(1, count // 4)]:
        _, expected = at(factor)
        # Where the last step began, the loss is training's own.
        is_own = factor == (1.0 if averages else 0.0)
        if is_batched or is_own:
            is_near = math.isclose(loss, expected, rel_tol=eps, abs_tol=eps)
            assert not math.isfinite(expected) or is_near, (factor, loss, expected)
        else:
            assert loss == expected or (math.isnan(loss) and math.isnan(expected)), (factor, loss, expected)
    sign = -1 if spec.maximize else 1
    if probe.retaken is not None:
        span = probe.window if searched or is_close else spec.span
        begin = training.before[steps - span]
        along = along & begin.keys()
        expected, after = at(probe.retaken, begin, now)
        check_same(flat(expected), flat(values_of(training.model)))
        _, was = at(0.0, begin, now)
        slack = eps * (1 + abs(was)) if is_batched else 0.0
        assert sign * after <= sign * was + slack, f"the loss was {was} before the step and is {after}"
        for step, kept in training.before.items():
            if steps - span < step < steps:  # between these steps, now shorter
                for name in along & kept.keys():
                    torch.lerp(begin[name], kept[name], probe.retaken, out=kept[name])
    elif searched:
        _, was = at(0.0)
        _, stays = at(1.0)
        slack = eps * (1 + abs(was)) if is_batched else 0.0
        assert not math.isfinite(was) or sign * stays <= sign * was + slack


def mean_loss(training, values, parts):
    """Return the loss of a deep copy with these parameters, of the micro-batches that a probe judges by."""
    own = random_states()
    losses = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts if training.spec.arguments["micro_batches"] == "all" else parts[-1:]:
            model = copy.deepcopy(training.model)
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
            for module, mode in zip(model.modules(), part.modes, strict=True):
                module.training = mode
            set_random_states(part.streams)
            losses.append(part.loss_of(model))
    set_random_states(own)
    return (losses[0] if len(losses) == 1 else torch.stack(losses).mean()).double().item()


def is_search(probe):
    """Whether a probe searched a first step: it looked at many scales, the shortest first."""
    return probe.factors[0] == 0.0


def asked_for(spec, costs, factors):
    """Return by how much the rule alone would move the level; ``None`` where what it says is not modelled."""
    if spec.rule is None:
        return 1.2 if any(map(math.isfinite, costs)) else 1.0
    if not all(map(math.isfinite, costs)):
        return None
    return 1.0 if len(set(costs)) == 1 else reference.next_lr(costs, 1.0, factors)


def check_move(training, level, parts):
    """Check that the level moved by what the rule asks for, as far as the heat and the limits let it."""
    spec, probe, steps = training.spec, training.scheduler.last_probe, training.steps
    state = training.scheduler.state_dict()["level"]
    value, was = state["value"], level["value"]
    lowest, highest = level_limits(training)
    is_close = spec.is_close(steps) and spec.direction == "step"
    if probe.retaken is not None:
        wanted = min(was * max(probe.retaken, 0.5), state["ceiling"])
        assert math.isclose(value, min(max(wanted, lowest), highest), rel_tol=1e-9)
        assert state["ceiling"] == (level["ceiling"] if is_close else 0.8 * was)
        return
    assert math.isclose(float(probe.factor), value / was, rel_tol=1e-9)
    heats = list(level["heat"]["heats"])
    if spec.span and steps >= spec.span and not is_close:
        heats = [*heats[1:], check_heat(training, state["heat"]["heats"][-1], value / was, parts)]
    sign = -1 if spec.maximize else 1
    costs = [sign * loss for loss in probe.losses.tolist()]
    if is_close:  # the step itself clearly raised the loss of its batch, or it did not
        ended, began = costs
        asked = 1 / 1.2 if ended - began > 0.1 * abs(began) else 1.0
    else:
        asked = asked_for(spec, costs, probe.factors)
    if asked is None:
        assert value <= max(was * 1.5, lowest) * (1 + 1e-9)
        return
    moved = moved_by_heat(asked, heats, state["heat"], spec.arguments["max_heat"]) ** annealing(spec, steps)
    expected = min(max(min(was * moved, 1.03 * level["ceiling"]), lowest), highest)
    facts = {
        "was": was,
        "value": value,
        "asked": asked,
        "moved": moved,
        "heats": heats,
        "state": state,
        "close": is_close,
    }
    assert math.isclose(value, expected, rel_tol=1e-9), (expected, facts, probe)


def check_heat(training, heat, moved, parts):
    """Check what averaging wins against deep copies, and return it as it was before the level moved."""
    spec, steps = training.spec, training.steps
    heat = heat / moved if heat > 0 else heat
    older, newer, now = training.before[steps - spec.span], training.before[steps - 1], training.ended
    both = older.keys() & newer.keys()
    sign = -1 if spec.maximize else 1
    at_newer = sign * mean_loss(training, {**now, **{name: newer[name] for name in both}}, parts)
    mixed = {name: between(older[name], newer[name], MEAN_AT) for name in both}
    at_mean = sign * mean_loss(training, {**now, **mixed}, parts)
    eps = 1e-9 if spec.is_double else 0.1 if parts[-1].has_autocast else 2e-4
    if math.isfinite(at_newer - at_mean):
        atol = eps * (abs(at_newer) + abs(at_mean) + 1e-3)
        assert math.isclose(heat, at_newer - at_mean, abs_tol=atol), (heat, at_newer, at_mean)
    else:
        assert math.isnan(heat)
    return heat


def level_limits(training):
    lowest, highest = training.spec.arguments.get("lr_limits", (1e-12, 1e4))
    bases = [base for base in training.scheduler.state_dict()["level"]["base_lrs"] if base]
    return lowest / max(bases), highest / min(bases)


def annealing(spec, steps):
    """Return what the level is multiplied by."""
    total = spec.arguments["total_steps"]
    if total is None:
        return 1.0
    done = min(1.0, steps / total)
    return 1 - done if spec.arguments["anneal"] == "linear" else (1 + math.cos(math.pi * done)) / 2


def ordered(training, rates):
    """Return the rates of all groups in AutoLR's order: those of the optimizers, and then what was added."""
    per_optimizer, start = [], 0
    for optimizer in training.optimizers:
        per_optimizer.append(rates[start : start + len(optimizer.param_groups)])
        start += len(optimizer.param_groups)
    later = [sum(each == index for each, _, _ in training.added) for index in range(len(per_optimizer))]
    first = [rate for own, count in zip(per_optimizer, later, strict=True) for rate in own[: len(own) - count]]
    left = [own[len(own) - count :] for own, count in zip(per_optimizer, later, strict=True)]
    return first + [left[optimizer].pop(0) for optimizer, _, _ in training.added]


def check_rates(training):
    """Check that each rate is the level, annealed and inside of the limits, and what else AutoLR says of it."""
    scheduler, spec = training.scheduler, training.spec
    rates = ordered(training, training.rates())
    last = [float(lr) for lr in scheduler.get_last_lr()]
    assert last == rates[: len(last)]  # a group that was added since the last step is not among them
    lowest, highest = spec.arguments.get("lr_limits", (1e-12, 1e4))
    state = scheduler.state_dict()["level"]
    assert math.isfinite(state["value"])
    assert 0 < state["value"] <= max(state["ceiling"], level_limits(training)[0]) * (1 + 1e-12)
    annealed = state["value"] * annealing(spec, scheduler.last_epoch)
    for rate, base, level in zip(rates, state["base_lrs"], scheduler.level, strict=False):
        expected = min(max(base * annealed, lowest), highest) if base else 0.0
        assert math.isclose(rate, expected, rel_tol=1e-9), (rate, expected)
        assert math.isclose(level, min(max(base * state["value"], lowest), highest) if base else 0.0, rel_tol=1e-9)
    for rate in rates:
        assert rate == 0.0 or lowest * (1 - 1e-12) <= rate <= highest * (1 + 1e-12)
    assert scheduler.last_epoch == training.seen
    steps = [probe.step for probe in scheduler.history]
    assert steps == sorted(set(steps))
    assert all(probe.window <= probe.step for probe in scheduler.history)


def check_plain(state):
    """Check that a state holds plain values and tensors only."""
    if isinstance(state, dict):
        assert all(isinstance(key, (str, int)) for key in state)
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for each in state:
            check_plain(each)
    else:
        assert state is None or type(state) in (bool, int, float, str, torch.Tensor), state
