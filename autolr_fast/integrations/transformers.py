"""AutoLR in the Trainers of transformers and TRL."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._machine.warning import WarnOnce
from ..scheduler import AutoLR
from ._kept import Kept

__all__ = ["AutoLRMixin", "attach"]


def attach(trainer: Any, **options: Any) -> None:
    """Have a Trainer find its learning rate by AutoLR.

    Call ``attach`` once, before ``trainer.train()``. The trainer becomes an `AutoLRMixin` of its own class.

    Args:
        trainer: a ``transformers.Trainer``, or one of a class made from it, such as ``Seq2SeqTrainer`` or TRL's
            ``SFTTrainer``.
        **options: of `AutoLR`, all but ``total_steps``, which the trainer knows.

    Raises:
        TypeError: if ``trainer`` is none, or of transformers before 5.19, or AutoLR has no such option.
        ValueError: if the trainer has a scheduler, or trains in a way that AutoLR cannot look into.

    Examples:
        >>> from transformers import Trainer, TrainingArguments  # doctest: +SKIP
        >>> trainer = Trainer(model, TrainingArguments("out"), train_dataset=train_set)  # doctest: +SKIP
        >>> attach(trainer, max_heat=0.2)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    kind = type(trainer)
    if isinstance(trainer, AutoLRMixin):
        raise ValueError(
            f"trainer is a {kind.__name__} that has AutoLR already: attach once, or use a class with AutoLRMixin"
        )
    if getattr(trainer, "_created_lr_scheduler", False):
        raise ValueError("trainer has begun to train: call attach before trainer.train()")
    _check_options(options)
    _check_trainer(trainer)
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    trainer.__class__ = type(kind.__name__, (AutoLRMixin, kind), members)
    trainer.autolr_options = options
    trainer._autolr_tell()


class AutoLRMixin:
    """Lets a Trainer class find its learning rate by AutoLR.

    Put the mixin before a Trainer among the bases of a class. ``trainer.lr_scheduler`` is the `AutoLR`. Its rates
    are logged as ``learning_rate``, its level as ``autolr/level``, and its state is in the ``scheduler.pt`` of each
    checkpoint.

    The loss of each micro-batch goes through AutoLR. A probe computes that loss again, and leaves the trainer as it
    was: attributes, ``state``, ``control``, and the containers in them. A probe logs nothing.

    Attributes:
        autolr_options: of `AutoLR`, all but ``total_steps``.

    Examples:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> class MyTrainer(AutoLRMixin, Trainer):  # doctest: +SKIP
        ...     autolr_options = {"max_heat": 0.2}
    """

    autolr_options: Mapping[str, Any] = {}

    _is_probing = False
    _autolr_is_new = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class where a Trainer comes first: its own scheduler would train."""
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[1 : cls.__mro__.index(AutoLRMixin)]
        if late := next((each for each in before if each.__module__.startswith(("transformers.", "trl."))), None):
            raise TypeError(
                f"{cls.__name__} has {late.__name__} before AutoLRMixin, whose scheduler would not be used: write "
                f"class {cls.__name__}(AutoLRMixin, {late.__name__})"
            )

    if TYPE_CHECKING:  # all else is the Trainer's

        def __getattr__(self, name: str) -> Any: ...

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> AutoLR:
        """Make the AutoLR of a training, as the Trainer does its own scheduler when the optimizer is there.

        Args:
            num_training_steps: optimizer steps of the whole training.
            optimizer: by default that of the trainer.

        Raises:
            TypeError: if AutoLR has no such option.
            ValueError: if the trainer has a scheduler, or trains in a way that AutoLR cannot look into.
        """
        _check_options(self.autolr_options)
        _check_trainer(self)
        self._autolr_tell()
        given = self.optimizer if optimizer is None else optimizer
        # A compiled model runs compiled under "inplace" alone, and self.model is what it was compiled from.
        compiled = {"evaluator": "inplace"} if self.args.torch_compile else {}
        options = {**compiled, **self.autolr_options}
        scheduler = AutoLR(given, self.model, total_steps=num_training_steps, **options)
        self.lr_scheduler: Any = scheduler
        self._created_lr_scheduler = True  # the Trainer's own mark: its next training makes a new one
        self._autolr_is_new = True
        return scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do what the trainer does, with the loss that it computes going through AutoLR."""
        if self._autolr_is_new:
            self._autolr_is_new = False
            self._autolr_check_resumed()
        compute_loss = self.compute_loss
        own = {name: value for name, value in vars(self).items() if name == "compute_loss"}

        def watched(model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
            return self._autolr_loss(compute_loss, model, inputs, *more, **options)

        vars(self)["compute_loss"] = watched  # on the instance: it stands before an override in any class
        try:
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            del vars(self)["compute_loss"]
            vars(self).update(own)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with ``autolr/level`` beside the learning rate; nothing while a probe computes the loss.

        Args:
            logs: name -> value.
            *args: of the trainer's own method, as are the next.
            **kwargs: by name.
        """
        if self._is_probing:
            return
        if "learning_rate" in logs and isinstance(self.lr_scheduler, AutoLR):
            logs["autolr/level"] = self.lr_scheduler.level[0]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, as the Trainer does on every rank; the state of the scheduler is that of the first rank alone."""
        if isinstance(self.lr_scheduler, AutoLR):
            self.lr_scheduler.share_losses()
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _autolr_check_resumed(self) -> None:
        """Raise a ValueError if training goes on from a checkpoint without a state of AutoLR."""
        if self.state.global_step and not self.lr_scheduler.last_epoch:
            raise ValueError(
                f"resume_from_checkpoint goes on at step {self.state.global_step}, and the checkpoint has no state "
                "of AutoLR: save checkpoints without save_only_model, or load the model alone and train anew"
            )

    def _autolr_loss(
        self, compute_loss: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what ``compute_loss`` returns, and have AutoLR see the mean loss of the micro-batch."""
        share = self._autolr_share(inputs, kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None))
        in_training: list[bool] = [True]
        returned: list[Any] = []

        def closure() -> Tensor:
            fresh = self._prepare_input(inputs)  # compute_loss takes labels out, or puts options in
            if in_training:
                in_training.clear()
                returned.append(compute_loss(model, fresh, *args, **kwargs))
                return _loss_of(returned[0]) / share
            with self._autolr_untouched(), self.compute_loss_context_manager():
                return _loss_of(compute_loss(model, fresh, *args, **kwargs)) / share

        self.lr_scheduler.loss(closure)
        return returned.pop()  # as it was returned, to the bit; and a closure that is kept holds no graph

    def _autolr_share(self, inputs: Any, items: Any) -> Tensor | float:
        """Return by how much the loss of a micro-batch is smaller than its mean over items, such as tokens.

        The Trainer divides it by the items of all micro-batches of the step, and a micro-batch may be short. If all
        are replayed, the mean of their losses shall be the loss of the step.

        Args:
            inputs: of the micro-batch.
            items: of all of them, if they were counted.
        """
        parts: int = self.current_gradient_accumulation_steps
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            is_scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        if parts == 1 or not is_scaled:
            return 1
        own = None if items is None else self._get_num_items_in_batch([inputs], self.args.device)
        if own is None or self.autolr_options.get("micro_batches") == "all":
            return 1 / parts
        share: Tensor = torch.as_tensor(own).clamp(min=1) / items
        return share

    @contextmanager
    def _autolr_untouched(self) -> Iterator[None]:
        """Put back at the end what the block changes of the trainer, and log nothing inside."""
        kept = Kept(self, self.state, self.control, but=("train_dataset", "eval_dataset"))
        self._is_probing = True
        try:
            yield
        finally:
            kept.restore()

    def _autolr_tell(self) -> None:
        """Tell once what the trainer was given and AutoLR does not read."""
        warn_once = vars(self).setdefault("_autolr_warn_once", WarnOnce())
        for message in _ignored(self.args):
            warn_once(message)


def _loss_of(returned: Any) -> Tensor:
    """Return the loss of what ``compute_loss`` returned: it alone, or with the outputs of the model."""
    loss: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return loss


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise a TypeError for options that AutoLR does not take."""
    known = [name for name in list(inspect.signature(AutoLR).parameters)[2:] if name != "total_steps"]
    for name in options:
        if name == "total_steps":
            raise TypeError(
                f"total_steps={options[name]!r}: the trainer gives the number of its steps; leave total_steps out, "
                "and set max_steps or num_train_epochs of TrainingArguments"
            )
        if name not in known:
            raise TypeError(f"{name}={options[name]!r} is no option of AutoLR: use one of {', '.join(known)}")


def _check_trainer(trainer: Any) -> None:
    """Raise a TypeError for what is no trainer; a ValueError for one whose steps or losses AutoLR cannot see."""
    for name in _NEEDED:
        if not hasattr(trainer, name):
            raise TypeError(
                f"trainer is a {type(trainer).__name__} without {name}: expected a Trainer of transformers 5.19 or "
                "later, or one of a class made from it"
            )
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            f"deepspeed={args.deepspeed!r}: DeepSpeed keeps parameters and steps to itself, and AutoLR cannot look "
            "along them; train without deepspeed, on several GPUs by torchrun (DistributedDataParallel)"
        )
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        raise ValueError(
            f"fsdp={args.fsdp!r}: AutoLR is not known to work where the Trainer shards the model; train without "
            "fsdp by torchrun (DistributedDataParallel), or use AutoLR in a loop of your own with "
            "torch.distributed.fsdp.fully_shard"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu}: torch.nn.DataParallel copies the model at each forward, where AutoLR does not "
            "look; start one process a GPU by torchrun, or set CUDA_VISIBLE_DEVICES=0"
        )
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(
            "parallelism_config splits the model or a sequence over ranks, and a probe cannot compute the loss of "
            "its own rank alone; use data parallelism by torchrun"
        )
    name = getattr(args.optim, "value", str(args.optim))
    if name.endswith("layerwise") or name in ("lomo", "adalomo"):
        raise ValueError(
            f"optim={name!r} steps inside of backward, layer by layer, where AutoLR does not see a step; use an "
            f"optimizer that steps once, such as {_WHOLE.get(name, 'adamw_torch')!r}"
        )
    if trainer.lr_scheduler is not None:
        raise ValueError(
            f"trainer has lr_scheduler={type(trainer.lr_scheduler).__name__}, and AutoLR takes its place: give "
            "optimizers=(optimizer, None), or train without AutoLR"
        )


_NEEDED = ("training_step", "create_scheduler", "compute_loss", "loss_is_scaled_for_ga", "_get_num_items_in_batch")
_WHOLE = {
    "galore_adamw_layerwise": "galore_adamw",
    "galore_adamw_8bit_layerwise": "galore_adamw_8bit",
    "galore_adafactor_layerwise": "galore_adafactor",
    "apollo_adamw_layerwise": "apollo_adamw",
}


def _ignored(args: Any) -> Iterator[str]:
    """Return what to tell of arguments that only the Trainer's own schedulers read."""
    if args.warmup_steps:
        yield (
            f"warmup_steps={args.warmup_steps} is ignored: AutoLR searches the first rate, and needs no warm-up; "
            "leave warmup_steps out"
        )
    name = getattr(args.lr_scheduler_type, "value", str(args.lr_scheduler_type))
    if name != "linear":
        yield (
            f"lr_scheduler_type={name!r} is ignored: AutoLR anneals by a cosine, or as its argument anneal says; "
            "leave lr_scheduler_type out"
        )
    if args.lr_scheduler_kwargs:
        yield (
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} is ignored: AutoLR has options of its own; leave "
            "lr_scheduler_kwargs out"
        )
