"""ALRTree: a beam search over learning rates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import check_count
from .._machine.ranks import ProcessGroup
from .._state import HEADER
from ..rule import FACTORS_3, check_factors
from .arguments import batch_size, check_lrs, check_model, short
from .checkpoint import check_state
from .epoch import Branch, Epoch, EpochInProgress, prune
from .optimizers import make_optimizer
from .passes import LossFunction, changing_buffers
from .random_numbers import RandomNumbers
from .ranks import Ranks
from .stack import Stack
from .trainer import Trainer

__all__ = ["ALRTree"]


class ALRTree:
    """Finds learning rates while it trains: N variants of each, an epoch long, of which the best M go on.

    Call `fit`, then `best_model`. The technique is the adaptive learning-rate tree (ALR) of Takase, Oyama &
    Kurihara, the background of Kim & Yu's slides. An epoch has four parts:

    1. Each of the M beams, a model with its learning rate, becomes N branches: the same model, and the learning
       rate times each factor. Every given learning rate is a beam at first, with the model's parameters.
    2. Every branch trains on all batches, the same ones in the same order, with the same dropout masks. The masks
       are of torch's random numbers; numbers that a forward draws elsewhere are its own.
    3. The branches are sorted by the mean of their training losses, as they were before each step. Batches weigh by
       their size. Equal losses go by the order of beams and factors. A branch whose loss is not finite is dropped.
    4. The M lowest are the next beams, with their parameters, buffers and optimizer state. The model takes over the
       parameters and buffers of the lowest.

    All branches are one stacked model, trained by one batched pass and one stacked optimizer step where that is
    faster. Every rank trains its share of the branches where ``torch.distributed`` is initialised. All ranks must
    be given the same arguments and the same batches then.

    Args:
        model: holds the best branch's parameters between epochs; values that are written to it then are lost.
            Parameters that require a gradient are trained, in the modes (train, eval) that the modules have now.
            Values that a forward remembers must be buffers: other attributes are put back to those of the beginning
            of the epoch. A ``DistributedDataParallel`` is refused.
        loss_fn: mean loss ``loss_fn(model(x), y)`` of a batch, a scalar tensor.
        lr: learning rate to start from, or several.
        beams: M.
        factors: N multiples of a beam's learning rate, some above 1 and some below, such as ``FACTORS_5``.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        optimizer_options: those of torch, by name: ``weight_decay``, 0 if it is not given. ``"sgd"`` also has
            ``momentum``, ``dampening`` and ``nesterov``; the others have ``betas`` and ``eps``.
        method: ``"batched"`` trains as many branches in one pass as memory allows. ``"sequential"`` trains one
            after another. ``"auto"`` takes the faster one, measured at the first batch and whenever the number of
            branches changes. ``"auto"`` is batched without measuring under `torch.use_deterministic_algorithms`. It
            is sequential with a warning if the model cannot be batched.
        max_memory: bytes for the gradients of one pass; by default a quarter of the memory that is free at the
            first batch.
        generator: the one that shuffles the batches, if it is not torch's default. Its state is saved. An epoch
            that was interrupted goes on with other batches without it.
        process_group: the ranks that share the branches; ``None`` is the default group.

    Attributes:
        model: as given.
        history: an ``Epoch`` for each one that has ended.

    Raises:
        TypeError: if model, loss function or generator are none.
        ValueError: if an argument is out of its range; names it.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> batches = [(torch.ones(1, 1), torch.ones(1, 1))] * 4
        >>> tree = ALRTree(model, nn.functional.mse_loss, lr=0.1)
        >>> tree.fit(batches, epochs=2)
        >>> tree.learning_rates
        [0.4, 0.2]
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        lr: float | Sequence[float],
        *,
        beams: int = 2,
        factors: Sequence[float] = FACTORS_3,
        optimizer: str = "sgd",
        optimizer_options: Mapping[str, Any] | None = None,
        method: str = "auto",
        max_memory: int | None = None,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ):
        check_model(model)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r}: expected a callable, such as torch.nn.functional.cross_entropy")
        beams = check_count("beams", beams, 1, "models")
        self.model = model
        self.history: list[Epoch] = []
        self._loss_fn = loss_fn
        self._ranks = Ranks(process_group)
        self._first_lrs = check_lrs(lr)
        self._beams = beams
        self._factors = check_factors(factors)
        self._optimizer = make_optimizer(optimizer, optimizer_options)
        most = max(len(self._first_lrs), beams)
        self._capacity = max(most, len(self._ranks.share(most * len(self._factors), rank=0)))
        self._trainer = Trainer(model, loss_fn, method, max_memory)
        self._random = RandomNumbers(model, generator)
        self._modes = [(module, module.training) for module in model.modules()]
        self._beam_lrs = self._first_lrs
        self._stack: Stack | None = None  # which buffers are stacked shows at a batch
        self._epoch: EpochInProgress | None = None

    @property
    def epoch(self) -> int:
        """Epochs that have ended."""
        return len(self.history)

    @property
    def method(self) -> str:
        """What trains the branches: ``"batched"`` or ``"sequential"``; as asked for, until that is chosen."""
        return self._trainer.method

    @property
    def learning_rates(self) -> list[float]:
        """The learning rates of the beams, best first."""
        return list(self._beam_lrs)

    def fit(
        self,
        loader: Iterable[tuple[Any, Any]],
        epochs: int,
        callback: Callable[[Epoch], object] = lambda epoch: None,
    ) -> None:
        """Train until so many epochs have ended in all, those before `load_state_dict` included.

        Args:
            loader: gives the batches ``(x, y)`` of an epoch each time it is iterated over.
            epochs: how many there shall be.
            callback: called with the record of each epoch.

        Raises:
            TypeError: if ``epochs`` is not a whole number, or ``callback`` is not callable.
            ValueError: if ``epochs`` is below 0.
            RuntimeError: if no branch of an epoch has a finite loss; see `end_epoch`.
        """
        check_count("epochs", epochs, 0, "epochs that there shall be in all")
        if not callable(callback):
            raise TypeError(f"callback={callback!r}: expected a callable, which is given the record of each epoch")
        while self.epoch < epochs:
            callback(self.fit_epoch(loader))

    def fit_epoch(self, loader: Iterable[tuple[Any, Any]]) -> Epoch:
        """Train one epoch, or the rest of one that has begun, and prune the branches.

        Args:
            loader: gives the batches ``(x, y)``. x is one object, a tuple or list of arguments, or a dict of
                keyword arguments of the model. Batches that an epoch has seen are passed over. They are drawn anew
                with the random numbers that they were drawn with.

        Returns:
            The record of the epoch: its branches, and those that go on.

        Raises:
            ValueError: if the loader gives no batches, or something else.
            RuntimeError: as `end_epoch` does; if the epoch was begun by `step`.
        """
        epoch = self._epoch or self._begin_epoch()
        for batch in epoch.remaining(loader, self._random):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError(f"loader gave {type(batch).__name__} {short(batch)}: expected pairs (x, y)")
            self.step(*batch)
        if not epoch.batches:
            raise ValueError(f"loader={short(loader)} gave no batches: an iterator serves once; give a DataLoader")
        return self.end_epoch()

    def step(self, x: Any, y: Any) -> Tensor:
        """Train every branch on one batch; `fit_epoch` does it for all.

        Args:
            x: the input of the model, as in `fit_epoch`.
            y: the target.

        Returns:
            The losses before the step, of the branches that this rank trains.
        """
        for module, training in self._modes:
            module.training = training
        epoch = self._epoch or self._begin_epoch()
        if self._stack is None:
            buffers = changing_buffers(self.model, self._loss_fn, x, y)
            self._stack = Stack(self.model, buffers, self._optimizer, self._capacity, copies=len(epoch.lrs))
        self._trainer.step(self._stack, epoch, x, y)
        return epoch.end_batch(batch_size(x, y), self._random.state())

    def end_epoch(self) -> Epoch:
        """Prune the branches; `fit_epoch` does it after the last batch.

        Raises:
            RuntimeError: if no branch has a finite loss. The model is then the best one of the epoch before. The
                tree has that model as its only beam, with a fresh optimizer. Also if no batch was seen, or if
                another rank is gone; names the rank.
        """
        epoch, stack = self._epoch, self._stack
        if epoch is None or stack is None or not epoch.batches:
            raise RuntimeError("no batch was seen: call fit_epoch(loader), or step(x, y) for each batch")
        losses = self._ranks.gather_losses(epoch.loss_sums / epoch.examples, len(epoch.branches))
        branches = [Branch(*branch, loss) for branch, loss in zip(epoch.branches, losses, strict=True)]
        survivors = prune(losses, self._beams)
        self._epoch = None
        if not survivors:
            self._stack = None  # the next one is made of the model
            self._beam_lrs = [self.history[-1].best.lr] if self.history else self._first_lrs
            tried = ", ".join(f"{branch.lr:.3g}" for branch in branches)
            raise RuntimeError(
                f"no branch of epoch {self.epoch + 1} has a finite loss, at learning rates {tried}. The model is "
                f"as it was after epoch {self.epoch}, and the tree goes on from it alone, with a fresh optimizer: "
                "start from a lower lr, look at the batches and the loss, or load the state saved last"
            )
        stack.prune(survivors, len(branches), self._ranks)
        stack.write_best(self.model)
        # A rank without branches drew no dropout masks.
        self._random.restore({name: self._ranks.values_of_first(at) for name, at in self._random.state().items()})
        self._beam_lrs = [branches[index].lr for index in survivors]
        self.history.append(Epoch(self.epoch + 1, tuple(branches), survivors))
        return self.history[-1]

    def best_model(self) -> nn.Module:
        """Return ``model``, which has the parameters and buffers of the last epoch's best branch."""
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain values and tensors, which load with ``torch.load(weights_only=True)``.

        Within an epoch, each rank's holds its own share of the branches.
        """
        return {
            **HEADER,
            "learning_rates": self.learning_rates,
            "factors": list(self._factors),
            "history": [
                {"branches": [tuple(branch) for branch in epoch.branches], "survivors": epoch.survivors}
                for epoch in self.history
            ],
            "model": copy.deepcopy(self.model.state_dict()),
            "stack": None if self._stack is None else self._stack.state_dict(),
            "trainer": self._trainer.state_dict(),
            "epoch": None if self._epoch is None else dict(vars(self._epoch)),
            "random": self._random.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned, into the model and torch's random-number state too.

        A search resumed from the state is bit for bit the one that was not interrupted. The loader may depend on
        nothing but torch's random numbers and the ``generator`` for that.

        Args:
            state_dict: of a tree of the same model and arguments, on as many ranks; between two epochs, on any.

        Raises:
            TypeError: if it is not a dict.
            ValueError: if it is not of such a tree; nothing is loaded then.
        """
        state = check_state(state_dict, self.state_dict(), self._ranks.position)
        stack = None
        if state["stack"] is not None:
            buffers = state["stack"]["tensors"]["buffers"]
            stack = Stack(self.model, buffers, self._optimizer, self._capacity, copies=0)
            stack.load_state_dict(state["stack"])
        self.model.load_state_dict(state["model"])
        self.history = [
            Epoch(number, tuple(Branch(*branch) for branch in epoch["branches"]), tuple(epoch["survivors"]))
            for number, epoch in enumerate(state["history"], start=1)
        ]
        self._beam_lrs = state["learning_rates"]
        self._stack = stack
        self._epoch = EpochInProgress(**state["epoch"]) if state["epoch"] else None
        self._trainer.load_state_dict(state["trainer"])
        self._random.restore(state["random"])

    def __repr__(self) -> str:
        lrs = ", ".join(f"{lr:.4g}" for lr in self._beam_lrs)
        return (
            f"ALRTree(lr=[{lrs}], beams={self._beams}, factors={self._factors}, epoch={self.epoch}, "
            f"method={self._trainer!r})"
        )

    def _begin_epoch(self) -> EpochInProgress:
        """Make branches of the beams."""
        branches = [(parent, lr * factor) for parent, lr in enumerate(self._beam_lrs) for factor in self._factors]
        share = [branches[index] for index in self._ranks.share(len(branches))]
        if self._stack is not None:
            self._stack.branch([parent for parent, _ in share])
        self._trainer.begin_epoch()
        self._epoch = EpochInProgress(self._ranks.position, branches, [lr for _, lr in share])
        return self._epoch
