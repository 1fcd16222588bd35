"""Lightning's Trainer with AutoLRCallback trains as the same loop written by hand with AutoLR."""

import copy
import importlib
import itertools
import math
import re
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

pytest.importorskip("lightning")

import lightning.pytorch as pl
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchmetrics import CatMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from autolr_fast import AutoLR
from autolr_fast.integrations.lightning import AutoLRCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None."),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter. step flavor"),
    pytest.mark.filterwarnings("ignore:.*LOCAL_RANK.*environment variable"),
]

BATCHES, EPOCHS, SKIPPED = 12, 2, (0, 7)
SOON = {"calibration_steps": 4, "probe_every_steps": 3, "probe_until_fraction": 1.0}  # probes in few steps


def loader(size=8, dtype=torch.float32):
    torch.manual_seed(5)
    x = torch.randn(BATCHES * 8, 6, dtype=dtype)
    return DataLoader(TensorDataset(x, (x[:, :3] + 0.5 * torch.randn(len(x), 3)).argmax(1)), size)


class Net(pl.LightningModule):
    """Its batches draw their dropout masks from a seed of their own, so that loops can be compared."""

    def __init__(self, returns="tensor", dropout=0.2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)
        )
        self.returns = returns
        self.rates = []

    def loss_of(self, batch):
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(batch_idx)

    def training_step(self, batch, batch_idx):
        if self.returns == "None" and batch_idx in SKIPPED:
            return None
        loss = self.loss_of(batch)
        if self.returns != "tensor alone":
            self.log("loss", loss)
        return {"loss": loss, "more": 1} if self.returns == "dict" else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-5, momentum=0.9)


def fit(module, *callbacks, ckpt_path=None, data=None, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS}
    trainer = pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})
    if data is None and not is_overridden("train_dataloader", module):
        data = loader()
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def by_hand(module, accumulate=1, clip=None, within=nullcontext, after=lambda: None, **options):
    """The loop with AutoLR and without Lightning; returns the scheduler, and the loss of each batch."""
    optimizer, losses = module.configure_optimizers(), []
    total_steps = EPOCHS * math.ceil(BATCHES / accumulate)
    scheduler = AutoLR(optimizer, module, total_steps=total_steps, **options)
    module.train()
    for epoch in range(EPOCHS):
        if epoch and isinstance(module, Growing):
            module.grow(optimizer)
        for index, batch in enumerate(loader()):
            torch.manual_seed(index)
            if not (module.returns == "None" and index in SKIPPED):

                def closure(batch=batch):
                    with within():
                        return module.loss_of(batch)

                loss = scheduler.loss(closure)
                losses.append(loss.item())
                (loss / accumulate).backward()
                if (index + 1) % accumulate == 0 or index + 1 == BATCHES:
                    if clip:
                        nn.utils.clip_grad_norm_(module.parameters(), clip)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    after()
            module.rates.append(optimizer.param_groups[0]["lr"])
    return scheduler, losses


def assert_same(module, hand):
    assert module.rates == hand.rates
    for name, value in hand.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def bf16():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


CASES = {  # what the trainer is given, what the loop, AutoLR, and what training_step returns
    "plain": ({}, {}, {}, "tensor"),
    "defaults": ({}, {}, {"calibration_steps": None, "probe_every_steps": 10}, "tensor"),
    "accumulation": ({"accumulate_grad_batches": 5}, {"accumulate": 5}, {}, "tensor"),
    "all micro-batches": ({"accumulate_grad_batches": 5}, {"accumulate": 5}, {"micro_batches": "all"}, "tensor"),
    "clipping": ({"gradient_clip_val": 0.1}, {"clip": 0.1}, {}, "tensor"),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"within": bf16}, {}, "tensor"),
    "streamed": ({}, {}, {"evaluator": "streamed"}, "tensor"),
    "dict output": ({}, {}, {}, "dict"),
    "None output": ({}, {}, {}, "None"),
}


@pytest.mark.usefixtures("every_probe")
@pytest.mark.parametrize("case", CASES)
def test_trains_as_the_loop_by_hand(case):
    given, looped, options, returns = CASES[case]
    module, hand, callback = Net(returns), Net(returns), AutoLRCallback(**{**SOON, **options})
    trainer = fit(module, callback, **given)
    scheduler, losses = by_hand(hand, **looped, **{**SOON, **options})
    assert_same(module, hand)
    probes = [(probe.step, probe.retaken, probe.losses.tolist()) for probe in callback.scheduler.history]
    assert probes == [(probe.step, probe.retaken, probe.losses.tolist()) for probe in scheduler.history]
    assert len(probes) > 4
    assert trainer.callback_metrics["loss"].item() == losses[-1]
    assert [(each.interval, each.frequency) for each in trainer.lr_scheduler_configs] == [("step", 1)]
    assert not {"training_step", "optimizer_step"} & vars(trainer.strategy).keys()


def test_a_compiled_module_trains_as_the_loop_by_hand():
    module, hand = Net("tensor alone"), Net()
    fit(torch.compile(module, backend="eager"), callback := AutoLRCallback(**SOON), data=loader())
    by_hand(hand, **SOON)
    assert_same(module, hand)
    assert callback.scheduler.evaluator.name == "inplace"


class Ranks(Net):
    """Says on each rank how it went."""

    def __init__(self, directory):
        super().__init__(dropout=0.0)
        self.layers[1] = nn.Identity()  # whose statistics would be those of a half batch
        self.double()  # rounding would be felt where the first search compares losses
        self.directory = directory

    def train_dataloader(self):  # Lightning's own sampler shuffles
        ranks, data = self.trainer.world_size, loader(dtype=torch.float64).dataset
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, 8 // ranks, sampler=sampler)

    def on_train_end(self):
        said = {"rates": self.rates, "weight": self.layers[0].weight.detach().clone()}
        torch.save(said, self.directory / f"rank{self.trainer.global_rank}of{self.trainer.world_size}.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_with_half_a_batch_each_are_one_with_the_whole(tmp_path):
    options = {"max_epochs": 1, "use_distributed_sampler": False}
    fit(Ranks(tmp_path), AutoLRCallback(**SOON), strategy="ddp_spawn", **{**options, "devices": 2})
    fit(Ranks(tmp_path), AutoLRCallback(**SOON), **options)
    first, second, alone = (torch.load(tmp_path / f"rank{name}.pt") for name in ("0of2", "1of2", "0of1"))
    assert first["rates"] == second["rates"]
    assert torch.equal(first["weight"], second["weight"])
    assert first["rates"] == pytest.approx(alone["rates"], rel=1e-6)
    assert torch.allclose(first["weight"], alone["weight"], rtol=1e-6)
    assert len(first["rates"]) == BATCHES
    assert max(first["rates"]) > 1e-3  # from 1e-5


@pytest.mark.usefixtures("every_probe")
def test_resumes_bit_for_bit_inside_an_open_window(tmp_path):
    options = {"calibration_steps": 4, "probe_every_steps": 10, "probe_until_fraction": 1.0}
    whole, kept = Net(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = fit(whole, AutoLRCallback(**options), kept, max_epochs=3, enable_checkpointing=True)
    path = tmp_path / "epoch=0.ckpt"
    assert torch.load(path, weights_only=True)["lr_schedulers"][0]["snapshots"]["windows"]
    resumed = Net()
    given = {"max_epochs": 3, "enable_checkpointing": True}
    again = fit(resumed, callback := AutoLRCallback(**options), copy.deepcopy(kept), ckpt_path=path, **given)
    whole.rates = whole.rates[BATCHES:]
    assert_same(resumed, whole)
    assert_equal(*(each.optimizers[0].state_dict() for each in (trainer, again)))
    assert [probe.step for probe in callback.scheduler.history] == [1, 2, 3, 4, 20, 30]


def test_a_checkpoint_without_autolr_is_refused(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="last")
    fit(Net(), kept, enable_checkpointing=True)
    with pytest.raises(
        ValueError, match=r"was saved without AutoLRCallback at global_step=24.*load_from_checkpoint"
    ):
        again = {"ckpt_path": tmp_path / "last.ckpt", "max_epochs": 3, "enable_checkpointing": True}
        fit(Net(), AutoLRCallback(**SOON), kept, **again)


def test_the_average_of_the_weights_is_that_of_those_that_autolr_leaves():
    module, hand, decay = Net(), Net(), 0.75
    fit(module, AutoLRCallback(**SOON), EMAWeightAveraging(decay=decay, use_buffers=False))
    averages = []

    def average():
        now = [each.detach().clone() for each in hand.parameters()]
        averages[:] = [decay * a + (1 - decay) * b for a, b in zip(averages or now, now, strict=True)]

    by_hand(hand, after=average, **SOON)
    assert module.rates == hand.rates
    for one, other in zip(module.parameters(), averages, strict=True):  # put in place as training ended
        assert torch.equal(one, other)


class Growing(Net):
    """A layer joins at the second epoch, at a rate that would ruin the network."""

    def __init__(self):
        super().__init__()
        self.late = nn.Linear(6, 3).requires_grad_(False)

    def loss_of(self, batch):
        return F.cross_entropy(self.layers(batch[0]) + self.late(batch[0]), batch[1])

    def grow(self, optimizer):
        optimizer.add_param_group({"params": list(self.late.requires_grad_(True).parameters()), "lr": 100.0})

    def on_train_epoch_start(self):
        if self.current_epoch:
            self.grow(self.optimizers().optimizer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.layers.parameters(), lr=1e-5, momentum=0.9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_step_of_a_group_that_joins_is_searched(precision):
    fit(module := Growing(), callback := AutoLRCallback(**SOON), precision=precision)
    scheduler, _ = by_hand(hand := Growing(), within=bf16 if precision == "bf16-mixed" else nullcontext, **SOON)
    assert_same(module, hand)
    assert [(probe.step, probe.lr_after) for probe in callback.scheduler.history] == [
        (probe.step, probe.lr_after) for probe in scheduler.history
    ]
    assert [probe.step for probe in scheduler.history if len(probe.losses) > 5] == [1, BATCHES + 1]


class Kept(Logger):
    """Keeps what it is given."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, *args):
        pass

    def of(self, name):
        return [metrics[name] for _, metrics in self.metrics if name in metrics]


class Talking(Net):
    """Logs in every way, and keeps where the trainer was in every run of a batch."""

    runs: list = []  # noqa: RUF012, of the class, so that a probe does not put it back

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"twice": 2 * loss, "mean": loss}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": loss.item()})
        self.runs.append((self.current_epoch, batch_idx, self.global_step, self.trainer.global_step))
        return loss


def test_a_probe_logs_nothing_and_sees_the_steps_own_global_step():
    Talking.runs.clear()
    logger, monitor, module = Kept(), LearningRateMonitor("step"), Talking()
    fit(module, AutoLRCallback(**SOON), monitor, logger=logger, log_every_n_steps=1)
    _, losses = by_hand(hand := Net(), **SOON)
    assert_same(module, hand)
    assert logger.of("direct") == losses
    assert logger.of("loss") == losses
    mean = torch.tensor(losses).view(EPOCHS, BATCHES).mean(1)
    assert logger.of("mean") == pytest.approx(mean.tolist(), rel=1e-5)
    assert logger.of("twice") == pytest.approx((2 * mean).tolist(), rel=1e-5)
    # Read as a batch starts, before its step.
    assert logger.of("lr-SGD") == [1e-5, *module.rates[:-1]]
    assert len(Talking.runs) > BATCHES * EPOCHS + 10
    steps = {(epoch, index): BATCHES * epoch + index for epoch, index, _, _ in Talking.runs}
    assert all(own == trainers == steps[epoch, index] for epoch, index, own, trainers in Talking.runs)


class Measuring(Net):
    """Updates metrics, and looks at them before a probe and after it."""

    def __init__(self):
        super().__init__()
        self.seen = CatMetric()
        self.accuracy = MulticlassAccuracy(3)
        self.several = MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)])  # share their states
        self.values, self.states = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        guess = self.layers(batch[0])
        self.seen.update(loss.detach())
        self.accuracy(guess, batch[1])
        self.several.update(guess, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        if batch_idx % 3 == 0:
            self.seen.compute()
        return loss

    def state(self):
        metrics = [self.seen, self.accuracy, *self.several.values(copy_state=False)]
        return [(each.metric_state, each._update_count, each._computed, each._forward_cache) for each in metrics]

    def on_before_optimizer_step(self, optimizer):
        self.states.append(copy.deepcopy(self.state()))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.values.append(outputs["loss"].item())
        assert_equal(self.state(), self.states[-1])


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, (list, tuple)):
        for each, its in zip(one, other, strict=True):
            assert_equal(each, its)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_equal(list(one.values()), list(other.values()))
    else:
        assert one == other


def test_metrics_are_as_training_left_them():
    module = Measuring()
    trainer = fit(module, callback := AutoLRCallback(**SOON))
    assert len(callback.scheduler.history) > 8
    assert module.seen.compute().tolist() == module.values
    assert module.seen._update_count == BATCHES * EPOCHS
    assert any(state[0][2] is not None for state in module.states)  # a value that was computed
    assert any(state[0][2] is None for state in module.states)
    assert 0 < trainer.callback_metrics["accuracy_epoch"] < 1
    assert module.several["MulticlassRecall"].update_count == BATCHES * EPOCHS


class Manual(Net):
    """Two optimizers, and the two lines of AutoLR."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        scheduler, optimizers = self.lr_schedulers(), self.optimizers()
        loss = scheduler.loss(lambda: self.loss_of(batch))
        self.log("loss", loss)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()

    def both(self):
        return (
            torch.optim.SGD(self.layers[0].parameters(), lr=1e-4, momentum=0.9),
            torch.optim.AdamW(self.layers[1:].parameters(), lr=1e-5),
        )

    def configure_optimizers(self):
        optimizers = list(self.both())
        total_steps = self.trainer.estimated_stepping_batches
        return optimizers, [AutoLR(optimizers, self, total_steps=total_steps, **SOON)]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in self.optimizers()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_optimizers_are_served_by_hand(precision):
    logging = {"logger": (logger := Kept()), "log_every_n_steps": 1}
    trainer = fit(module := Manual(), LearningRateMonitor("step"), precision=precision, **logging)
    hand = Manual().train()
    optimizers = hand.both()
    scheduler = AutoLR(optimizers, hand, total_steps=BATCHES * EPOCHS, **SOON)
    for index, batch in [*enumerate(loader()), *enumerate(loader())]:
        torch.manual_seed(index)
        hand.zero_grad()
        with bf16() if precision == "bf16-mixed" else nullcontext():
            loss = scheduler.loss(lambda: hand.loss_of(batch))  # noqa: B023
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
        hand.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    assert_same(module, hand)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == BATCHES * EPOCHS
    assert logger.of("lr-SGD") == [1e-4, *(rate for rate, _ in module.rates[:-1])]


def test_two_optimizers_are_refused_by_the_trainer_itself():
    module = Manual()
    module.automatic_optimization = True
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        fit(module, AutoLRCallback())


def test_the_validation_loss_can_end_the_training():
    class Watching(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 6.0 + abs(6.0 - self.current_epoch))

        def on_validation_epoch_end(self):
            if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
                self.lr_schedulers().watch(self.trainer.callback_metrics["val_loss"])
                if self.lr_schedulers().has_ended:
                    self.trainer.should_stop = True

        def val_dataloader(self):
            return loader(96)

    module, callback = Watching(dropout=0.0), AutoLRCallback(total_steps=None, **SOON)
    trainer = fit(module, callback, max_epochs=40)
    assert callback.scheduler.has_ended
    assert trainer.current_epoch == 18  # 12 losses, and half as long again
    assert module.rates[-1] < 0.1 * max(module.rates)


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(loader().dataset)


def test_a_training_of_unknown_length_asks_for_it():
    endless = DataLoader(Endless(), 8)
    with pytest.raises(ValueError, match=r"total_steps is not known.*=-1: give AutoLRCallback\(total_steps=...\)"):
        fit(Net(), AutoLRCallback(), data=endless, limit_train_batches=None)
    with pytest.raises(ValueError, match="estimated_stepping_batches=inf.*total_steps=None"):
        fit(Net(), AutoLRCallback(), max_epochs=-1)
    with pytest.raises(ValueError, match="is not known, with GradientAccumulationScheduler: give"):
        fit(Net(), AutoLRCallback(), GradientAccumulationScheduler({1: 2}))
    for options, given, found in [
        ({}, {"max_steps": 6}, 6),
        ({"total_steps": None}, {"limit_train_batches": 5}, None),
    ]:
        fit(Net(), callback := AutoLRCallback(**options, **SOON), data=endless, max_epochs=1, **given)
        assert f"total_steps={found}," in repr(callback.scheduler)
        assert callback.scheduler.last_epoch in (5, 6)


class Drawing(Net):
    def training_step(self, dataloader_iter):
        pass


class WithScheduler(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


class ByHand(Net):
    automatic_optimization = False


REFUSED = {
    "a scheduler": (WithScheduler, [], "has CosineAnnealingLR.*return the optimizer alone"),
    "manual optimization": (
        ByHand,
        [],
        r"(?s)automatic_optimization=False.*self.lr_schedulers\(\).loss\(.*step\(\)",
    ),
    "stochastic averaging": (
        Net,
        [StochasticWeightAveraging(0.1)],
        "a learning rate of its own: use WeightAveraging",
    ),
    "an iterator": (Drawing, [], "takes dataloader_iter.*take batch and batch_idx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    kind, callbacks, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit(kind(), AutoLRCallback(), *callbacks)


def test_two_callbacks_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AutoLRCallback`"):
        fit(Net(), AutoLRCallback(), AutoLRCallback())


def test_refuses_a_strategy_that_accumulates_by_itself():
    class Own(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(ValueError, match="strategy=Own: AutoLRCallback serves one device and DDP"):
        fit(Net(), AutoLRCallback(), strategy=Own(torch.device("cpu")))


class Twice(torch.optim.SGD):
    """Looks at the loss again after its step, as line searches do."""

    def step(self, closure):
        closure()
        super().step()
        return closure()


def test_an_optimizer_that_runs_the_training_step_twice_is_refused():
    class Searching(Net):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=1e-5)

    with pytest.raises(ValueError, match="optimizer=Twice runs the training step more than once"):
        fit(Searching(), AutoLRCallback(**SOON))


def test_refuses_options_that_autolr_does_not_have():
    for options, name in [({"max_heats": 1}, "max_heats"), ({"model": nn.Linear(1, 1)}, "model")]:
        with pytest.raises(TypeError, match=f"AutoLRCallback: .*'{name}'. Give keyword arguments of AutoLR"):
            AutoLRCallback(**options)


def test_an_error_and_another_fit_leave_nothing_behind():
    class Failing(Net):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and self.global_step == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module, callback = Failing(), AutoLRCallback(**SOON)
    trainer = pl.Trainer(
        max_steps=6, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader())
    first = callback.scheduler
    assert first.last_epoch == 3
    assert not {"training_step", "optimizer_step"} & vars(trainer.strategy).keys()
    assert not {"log", "log_dict"} & vars(module).keys()
    Failing.fails = False
    trainer.fit(module, loader())
    assert callback.scheduler is not first
    assert callback.scheduler.last_epoch == 3  # the trainer goes on from its step 3 to 6
    assert "total_steps=3," in repr(callback.scheduler)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_needs_nothing(precision, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    module, hand = Net().layers, Net().layers
    states = []
    for net, is_fabrics in ((module, True), (hand, False)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
        model = net
        if is_fabrics:
            model, optimizer = fabric.setup(net, optimizer)
        scheduler = AutoLR(optimizer, model, total_steps=BATCHES, **SOON)
        within = bf16 if precision == "bf16-mixed" and not is_fabrics else nullcontext
        for index, (x, y) in enumerate(loader()):
            torch.manual_seed(index)
            optimizer.zero_grad()

            def closure(model=model, x=x, y=y, within=within):
                with within():
                    output = model(x)
                return F.cross_entropy(output.float(), y)

            loss = scheduler.loss(closure)
            fabric.backward(loss) if is_fabrics else loss.backward()
            optimizer.step()
            scheduler.step()
        states.append((net.state_dict(), [probe.losses.tolist() for probe in scheduler.history]))
        if is_fabrics:
            kept = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            fabric.save(tmp_path / "state.ckpt", kept)
            before = repr(scheduler.state_dict())
            again, other = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-5))
            loaded = {
                "model": again,
                "optimizer": other,
                "scheduler": AutoLR(other, again, total_steps=BATCHES, **SOON),
            }
            fabric.load(tmp_path / "state.ckpt", loaded)
            assert repr(loaded["scheduler"].state_dict()) == before
    assert_equal(*states)
    assert len(states[0][1]) > 4


@pytest.mark.parametrize("name", ["lightning_callback", "fabric"])
def test_example(name, capsys):
    pytest.importorskip("sklearn")
    importlib.import_module(f"examples.{name}").main()
    level, accuracy = re.findall(r"-> (.*), test accuracy (.*)%", capsys.readouterr().out)[-1]
    assert float(level) > 1e-3  # from 1e-6
    assert float(accuracy) > 97
