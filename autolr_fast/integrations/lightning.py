"""Lightning: a callback by which AutoLR sees every training step's loss, and moves the rate of the optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor

from .._isolation import ClosureError
from ..scheduler import AutoLR

__all__ = ["AutoLRCallback"]


class AutoLRCallback(Callback):  # type: ignore[misc]
    """Finds the learning rate of a ``LightningModule`` while ``Trainer.fit`` trains it.

    Give one to ``Trainer(callbacks=[AutoLRCallback()])``, and return the optimizer alone from
    ``configure_optimizers``. An `AutoLR` becomes the trainer's one scheduler, so ``LearningRateMonitor`` and
    checkpoints have it. AutoLR sees the loss of each ``training_step``. A probe calls ``training_step`` again on
    its batch, and logs nothing.

    Args:
        **options: the keyword arguments of `AutoLR`. ``total_steps`` is ``trainer.estimated_stepping_batches`` if
            it is not among them.

    Attributes:
        scheduler: the `AutoLR` of the last fit in this process; ``None`` before.

    Raises:
        TypeError: if an option is none of AutoLR's.
        ValueError: as a fit begins, if AutoLR cannot serve the module or the trainer.

    Examples:
        >>> callback = AutoLRCallback(probe_every_steps=20)
        >>> trainer = pl.Trainer(max_epochs=10, callbacks=[callback], logger=False)
        >>> callback.scheduler is None  # until trainer.fit(module)
        True
    """

    def __init__(self, **options: Any):
        try:
            inspect.signature(AutoLR).bind(None, None, **options)
        except TypeError as error:
            raise TypeError(
                f"AutoLRCallback: {error}. Give keyword arguments of AutoLR other than optimizer and model, which "
                "the trainer has"
            ) from None
        self._options = options
        self.scheduler: AutoLR | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build AutoLR: the optimizer is there, and its state of a checkpoint is not loaded yet."""
        _check(trainer, pl_module)
        options = dict(self._options)
        if "total_steps" not in options:
            options["total_steps"] = _total_steps(trainer)
        strategy = trainer.strategy
        assert strategy.model is not None
        self.scheduler = AutoLR(trainer.optimizers, strategy.model, **options)
        strategy.lr_scheduler_configs.append(LRSchedulerConfig(self.scheduler, interval="step"))
        vars(strategy)["training_step"] = _seen(self.scheduler, pl_module, strategy.training_step)
        vars(strategy)["optimizer_step"] = _gradients_first(strategy.optimizer_step)

    def state_dict(self) -> dict[str, Any]:
        """Return something, so that Lightning warns if a checkpoint is gone on from without the callback."""
        return {"steps": self.scheduler.last_epoch if self.scheduler else 0}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on from a checkpoint that AutoLR was no part of."""
        if trainer.ckpt_path and trainer.global_step and self.scheduler and not self.scheduler.last_epoch:
            raise ValueError(
                f"ckpt_path={trainer.ckpt_path!r} was saved without AutoLRCallback at global_step="
                f"{trainer.global_step}, and has no state of AutoLR. Load its weights alone, by "
                f"{type(pl_module).__name__}.load_from_checkpoint(path), and fit without ckpt_path"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the strategy its own methods back."""
        _put_back(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the strategy its own methods back."""
        _put_back(trainer)


def _check(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise a ValueError if AutoLR cannot serve the module or the trainer."""
    if not module.automatic_optimization:
        raise ValueError(_MANUAL.format(type(module).__name__))
    if trainer.lr_scheduler_configs:
        names = " and ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
        raise ValueError(
            f"the trainer has {names}, and AutoLRCallback sets the rate alone, without a warm-up: return the "
            "optimizer alone from configure_optimizers"
        )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "StochasticWeightAveraging sets a learning rate of its own: use WeightAveraging or EMAWeightAveraging "
            "with AutoLRCallback, or neither of both"
        )
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or strategy.handles_gradient_accumulation:
        raise ValueError(
            f"strategy={type(strategy).__name__}: AutoLRCallback serves one device and DDP, as Trainer(devices=1) "
            "and Trainer(strategy='ddp'); another strategy keeps parameters or steps elsewhere"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            "training_step takes dataloader_iter, and a probe could not run it again on the same batch: take batch "
            "and batch_idx"
        )


def _total_steps(trainer: pl.Trainer) -> int:
    """Return the optimizer steps of the training from here on; raise a ValueError if they are not known."""
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(f"total_steps is not known, with GradientAccumulationScheduler: {_GIVE_STEPS}")
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(f"total_steps is not known, with estimated_stepping_batches={steps}: {_GIVE_STEPS}")
    # A second fit goes on counting, with a new optimizer; a checkpoint brings the state of its AutoLR.
    done = 0 if trainer.ckpt_path else trainer.global_step
    return max(1, int(steps) - done)


def _seen(scheduler: AutoLR, module: pl.LightningModule, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the strategy's ``training_step``, whose losses the scheduler sees."""

    def training_step(*args: Any) -> Any:
        step = _Step(module, run, args)
        with suppress(_NoLossError):
            scheduler.loss(step)
        output, step.output = step.output, None  # a probe keeps the step, and no graph
        return output

    return training_step


def _gradients_first(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the strategy's ``optimizer_step``, which begins as the gradients are there.

    Lightning computes them inside ``optimizer.step``. AutoLR asks before that which param groups will move.
    """

    def optimizer_step(optimizer: Any, closure: Callable[[], Any], *args: Any, **options: Any) -> Any:
        results = [closure()]

        def result() -> Any:
            if not results:
                raise ValueError(
                    f"optimizer={type(optimizer).__name__} runs the training step more than once in its step, and "
                    "AutoLRCallback sees one loss a step: use another optimizer, or none of AutoLR"
                )
            return results.pop()

        return run(optimizer, result, *args, **options)

    return optimizer_step


def _put_back(trainer: pl.Trainer) -> None:
    for name in ("training_step", "optimizer_step"):
        vars(trainer.strategy).pop(name, None)


class _Step:
    """Runs one batch as in training when it is called first, and unnoticed from then on.

    Args:
        module: that is trained.
        run: the strategy's ``training_step``, with the contexts of its precision and the forward of its wrapper.
        args: of the module's ``training_step``.

    Attributes:
        output: what ``training_step`` returned at first.
    """

    def __init__(self, module: pl.LightningModule, run: Callable[..., Any], args: tuple[Any, ...]):
        self.output: Any = None
        self._has_run = False
        self._module = module
        self._run = run
        self._args = args
        self._steps_done = _progress(module.trainer).completed

    def __call__(self) -> Tensor:
        if self._has_run:
            with _unnoticed(self._module, self._steps_done):
                return _loss_of(self._run(*self._args))
        self._has_run = True
        self.output = self._run(*self._args)
        return _loss_of(self.output)


class _NoLossError(ClosureError):
    """``training_step`` returned None to skip a batch, or what the trainer will refuse."""


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise _NoLossError(
            f"training_step returned {loss!r} when a probe ran it again, and a loss in training: let what it "
            "returns depend on the batch alone"
        )
    return loss


@contextmanager
def _unnoticed(module: pl.LightningModule, steps_done: int) -> Iterator[None]:
    """Have ``self.log`` and the loggers do nothing, and ``global_step`` be that of the training step."""
    trainer, progress = module.trainer, _progress(module.trainer)
    loggers, completed = trainer.loggers, progress.completed
    vars(module).update(log=_do_nothing, log_dict=_do_nothing)  # a probe puts the module's attributes back
    trainer.loggers = [DummyLogger() for _ in loggers]
    progress.completed = steps_done
    try:
        yield
    finally:
        trainer.loggers = loggers
        progress.completed = completed


def _do_nothing(*args: Any, **options: Any) -> None:
    pass


def _progress(trainer: pl.Trainer) -> Any:
    """Return what counts the optimizer steps, as ``global_step``."""
    return trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total


_GIVE_STEPS = (
    "give AutoLRCallback(total_steps=...), in optimizer steps, or total_steps=None to train without annealing"
)
_MANUAL = """{} has automatic_optimization=False, and AutoLRCallback cannot see which loss its steps are of. Leave \
the callback out, return [optimizer], [AutoLR(optimizer, self, total_steps=...)] from configure_optimizers, and \
write in training_step:
    loss = self.lr_schedulers().loss(lambda: self.loss_of(batch))  # the closure logs nothing
    self.lr_schedulers().step()  # after self.manual_backward(loss) and optimizer.step()"""
