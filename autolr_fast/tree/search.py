"""ALRTree: a beam search over learning rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import ProcessGroup
from ..scoring import FACTORS_3, check_factors
from .checks import batch_size, check_lrs, check_model, check_shapes, short
from .open_epoch import OpenEpoch, random_state, set_random_state
from .optimizers import make_optimizer
from .passes import LossFunction, changing_buffers
from .ranks import Ranks
from .records import Branch, Epoch, prune
from .stack import Stack
from .trainer import Trainer

__all__ = ["ALRTree"]


class ALRTree:
    """Finds learning rates while it trains: N variants of each, an epoch long, of which the best M go on.

    The ALR technique (adaptive learning-rate tree; Takase, Oyama & Kurihara, the background of Kim & Yu's slides).
    An epoch:

    1. Each of the M beams, a model with its learning rate, becomes N branches: the same model, and the learning
       rate times each factor. (At first there is one beam for each given learning rate, all with the model's
       parameters, so the factors apply to the first epoch too.)
    2. Every branch trains on all batches, the same ones in the same order, with the same dropout masks (of torch's
       random numbers; what a forward draws elsewhere is its own).
    3. The branches are sorted by the mean of their training losses, as they were before each step; batches weigh by
       their size. Equal losses go by the order of beams and factors. One that is not finite is dropped.
    4. The M lowest are the next beams, with their parameters, buffers and optimizer state. The model takes over the
       parameters and buffers of the lowest.

    All branches are one stacked model, trained by one batched pass and one stacked optimizer step where that is
    faster. Where ``torch.distributed`` is initialised, every rank trains its share of them; all ranks must be given
    the same arguments and the same batches.

    Args:
        model: holds the best branch's parameters between epochs; what else is written to it then is lost. Those
            that require a gradient are trained, in the modes (train, eval) that its modules have now. What a
            forward remembers must be a buffer: other attributes are put back to what they were at the beginning of
            the epoch. Not a ``DistributedDataParallel``.
        loss_fn: mean loss ``loss_fn(model(x), y)`` of a batch, a scalar tensor.
        lr: learning rate to start from, or several.
        beams: M.
        factors: N multiples of a beam's learning rate, some above 1 and some below, such as ``FACTORS_5``.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``; the arguments down to ``eps`` are torch's.
        momentum: of ``"sgd"``.
        dampening: of ``"sgd"``.
        nesterov: of ``"sgd"``.
        betas: of ``"adam"`` and ``"adamw"``.
        eps: of ``"adam"`` and ``"adamw"``.
        weight_decay: of any.
        method: ``"batched"``, ``"sequential"``, or ``"auto"``, the faster of them; see :class:`Trainer`.
        max_memory: bytes for the gradients of one pass; by default a quarter of what is free.
        generator: the one that shuffles the batches, if it is not torch's default. Its state is saved, and without
            it an epoch that was interrupted goes on with other batches.
        process_group: the ranks that share the branches; ``None`` is the default group.

    Attributes:
        model: as given.
        history: an :class:`Epoch` for each one that has ended.

    Raises:
        TypeError: if model, loss function or generator are none.
        ValueError: if an argument is out of its range; names it.

    Example:
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
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        method: str = "auto",
        max_memory: int | None = None,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ):
        check_model(model)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r}: expected a callable, such as torch.nn.functional.cross_entropy")
        if not isinstance(beams, int) or isinstance(beams, bool) or beams < 1:
            raise ValueError(f"beams={beams!r}: expected a whole number, 1 or more")
        self._first_lrs = check_lrs(lr)
        self._beams = beams
        self._factors = check_factors(factors)
        sgd = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        self._optimizer = make_optimizer(optimizer, sgd, {"betas": betas, "eps": eps}, weight_decay)
        self._trainer = Trainer(model, loss_fn, method, max_memory)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator={generator!r}: expected the torch.Generator that shuffles the batches")
        self._generator = generator
        self._ranks = Ranks(process_group)
        self._modes = [(module, module.training) for module in model.modules()]
        self._loss_fn = loss_fn
        self._lrs = list(self._first_lrs)
        self._stack: Stack | None = None  # which buffers are stacked shows at the first batch
        self._open: OpenEpoch | None = None
        self.model = model
        self.history: list[Epoch] = []

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
        return list(self._lrs)

    def fit(
        self,
        loader: Iterable[tuple[Any, Any]],
        epochs: int,
        callback: Callable[[Epoch], object] = lambda epoch: None,
    ) -> None:
        """Train until so many epochs have ended in all, those before :meth:`load_state_dict` included.

        Args:
            loader: gives the batches ``(x, y)`` of an epoch each time it is iterated over.
            epochs: how many there shall be.
            callback: called with the record of each epoch.

        Raises:
            TypeError: if ``callback`` is not callable.
            ValueError: if ``epochs`` is not a whole number, 0 or more.
            RuntimeError: if no branch of an epoch has a finite loss; see :meth:`end_epoch`.
        """
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 0:
            raise ValueError(f"epochs={epochs!r}: expected how many epochs there shall be in all, a whole number")
        if not callable(callback):
            raise TypeError(f"callback={callback!r}: expected a callable, which is given the record of each epoch")
        while self.epoch < epochs:
            callback(self.fit_epoch(loader))

    def fit_epoch(self, loader: Iterable[tuple[Any, Any]]) -> Epoch:
        """Train one epoch, or the rest of one that has begun, and prune the branches.

        Args:
            loader: gives the batches ``(x, y)``; x is what the model takes: one object, a tuple or list of
                arguments, or a dict of keyword arguments. Of an epoch that has begun, those that were seen are
                passed over, drawn anew with the random numbers that they were drawn with.

        Returns:
            What the branches did.

        Raises:
            ValueError: if the loader gives no batches, or something else.
            RuntimeError: as :meth:`end_epoch` does; if the epoch was begun by :meth:`step`.
        """
        for batch in self._remaining(loader):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError(f"loader gave {type(batch).__name__} {short(batch)}: expected pairs (x, y)")
            self.step(*batch)
        if self._open is None or self._open.batches == 0:
            self._open = None
            raise ValueError(
                f"loader={short(loader)} gave no batches: an iterator can be used once; give a DataLoader"
            )
        return self.end_epoch()

    def step(self, x: Any, y: Any) -> Tensor:
        """Train every branch on one batch; :meth:`fit_epoch` does it for all.

        Args:
            x: what the model takes, as in :meth:`fit_epoch`.
            y: the target.

        Returns:
            The losses before the step, of the branches that this rank trains.
        """
        self._set_modes()
        if self._stack is None:
            self._stack = self._make_stack(changing_buffers(self.model, self._loss_fn, x, y))
            self._stack.fill(self.model, len(self._lrs))
        if self._open is None:
            self._open = OpenEpoch(None)
        if not self._open.branches:
            self._grow(self._open, self._stack)
        share = self._ranks.share(len(self._open.branches))
        lrs = [self._open.branches[index].lr for index in share]
        losses = self._trainer.step(self._stack, lrs, x, y)
        size = batch_size(x, y)
        self._open.totals += size * losses.double()
        self._open.examples += size
        self._open.batches += 1
        self._open.now = random_state(self._stack.device, self._generator)
        return losses

    def end_epoch(self) -> Epoch:
        """Prune the branches; :meth:`fit_epoch` does it after the last batch.

        Raises:
            RuntimeError: if no branch has a finite loss. The model is then the best one of the epoch before, and
                the tree has it as its only beam, with a fresh optimizer. If no batch was seen. If another rank is
                gone; names it.
        """
        if self._open is None or self._stack is None or not self._open.batches:
            raise RuntimeError("no batch was seen: call fit_epoch(loader), or step(x, y) for each batch")
        open_branches = self._open.branches
        losses = self._ranks.gather(self._open.totals / self._open.examples, len(open_branches))
        survivors = prune(losses, self._beams)
        self._open = None
        if not survivors:
            self._trainer.forget()
            self._lrs = [self.history[-1].best.lr] if self.history else list(self._first_lrs)
            self._stack.fill(self.model, len(self._lrs))
            tried = ", ".join(f"{branch.lr:.3g}" for branch in open_branches)
            raise RuntimeError(
                f"no branch of epoch {self.epoch + 1} has a finite loss, at learning rates {tried}. The model is "
                f"as it was after epoch {self.epoch}, and the tree goes on from it alone, with a fresh optimizer: "
                "start from a lower lr, look at the batches and the loss, or load the state saved last"
            )
        branches = [branch._replace(loss=loss) for branch, loss in zip(open_branches, losses, strict=True)]
        self._ranks.spread(self._stack.tensors(), survivors, len(branches))
        self._stack.count = len(survivors)
        # A rank without branches took no steps and drew no masks.
        self._stack.taken = self._ranks.first(torch.tensor(self._stack.taken)).tolist()
        random = random_state(self._stack.device, self._generator)
        random = {name: self._ranks.first(state) for name, state in random.items()}
        set_random_state(random, self._stack.device, self._generator)
        self._stack.put(0, self.model)
        self._lrs = [branches[index].lr for index in survivors]
        self.history.append(Epoch(self.epoch + 1, tuple(branches), survivors))
        return self.history[-1]

    def best_model(self) -> nn.Module:
        """Return ``model``, which has the parameters and buffers of the last epoch's best branch."""
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain values and tensors, which load with ``torch.load(weights_only=True)``.

        Within an epoch, each rank's holds its own share of the branches.
        """
        device = next(self.model.parameters()).device
        return {
            "learning_rates": list(self._lrs),
            "factors": list(self._factors),
            "history": [
                {"branches": [list(branch) for branch in epoch.branches], "survivors": list(epoch.survivors)}
                for epoch in self.history
            ],
            "model": copy.deepcopy(self.model.state_dict()),
            "stack": None if self._stack is None else self._stack.state_dict(),
            "trainer": self._trainer.state_dict(),
            "open": None if self._open is None else self._open.state_dict(self._ranks),
            "random": random_state(device, self._generator),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, into the model and torch's random-number state too.

        A search resumed from it is bit for bit the one that was not interrupted, if the loader depends on nothing
        but torch's random numbers and the ``generator``.

        Args:
            state_dict: of a tree of the same model and arguments, on as many ranks; between two epochs, on any.

        Raises:
            TypeError: if it is not a dict.
            ValueError: if it is not of such a tree; nothing is loaded then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict={short(state_dict)}: pass what ALRTree.state_dict() returned")
        if different := set(self.state_dict()) ^ set(state_dict):
            raise ValueError(
                f"state_dict has the keys {sorted(state_dict)} and should not differ in {sorted(different)}: pass "
                "what ALRTree.state_dict() returned"
            )
        opened = None if state_dict["open"] is None else OpenEpoch.of(state_dict["open"], self._ranks)
        if opened is not None and opened.branches and state_dict["factors"] != list(self._factors):
            raise ValueError(
                f"state_dict is of an epoch with the factors {state_dict['factors']}, and this tree has "
                f"{list(self._factors)}: give ALRTree the same, or a state saved between two epochs"
            )
        check_shapes(self.model.state_dict(), state_dict["model"])
        stack = None
        if state_dict["stack"] is not None:
            buffers = state_dict["stack"]["buffers"]
            check_shapes({name: None for name, _ in self.model.named_buffers() if name in buffers}, buffers)
            stack = self._make_stack(list(buffers))
            stack.load_state_dict(state_dict["stack"])
        self._set_modes()
        self.model.load_state_dict(state_dict["model"])
        self._lrs = list(state_dict["learning_rates"])
        self.history = [
            Epoch(number, tuple(Branch(*branch) for branch in epoch["branches"]), tuple(epoch["survivors"]))
            for number, epoch in enumerate(state_dict["history"], start=1)
        ]
        if opened is not None and stack is not None:
            opened.totals = opened.totals.to(stack.device)
        self._stack, self._open = stack, opened
        self._trainer.load_state_dict(state_dict["trainer"], stack)
        set_random_state(state_dict["random"], next(self.model.parameters()).device, self._generator)

    def __repr__(self) -> str:
        lrs = ", ".join(f"{lr:.4g}" for lr in self._lrs)
        return (
            f"ALRTree(lr=[{lrs}], beams={self._beams}, factors={self._factors}, epoch={self.epoch}, "
            f"method={self._trainer!r})"
        )

    def _set_modes(self) -> None:
        for module, training in self._modes:
            module.training = training

    def _remaining(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Give the batches that the open epoch has not seen; opens one if none is."""
        device = next(self.model.parameters()).device
        if self._open is None:
            self._open = OpenEpoch(random_state(device, self._generator))
            yield from loader
            return
        if self._open.start is None:
            raise RuntimeError(
                "this epoch was begun by step(), and which of the loader's batches it has seen is not known: end "
                "it by step() and end_epoch()"
            )
        set_random_state(self._open.start, device, self._generator)
        batches = iter(loader)
        for number in range(self._open.batches):
            if next(batches, None) is None:
                raise ValueError(
                    f"loader={short(loader)} gave {number} batches, and {self._open.batches} of this epoch were "
                    "seen: give the loader that the epoch began with"
                )
        if self._open.batches:
            set_random_state(self._open.now, device, self._generator)
        yield from batches

    def _make_stack(self, buffers: Sequence[str]) -> Stack:
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        most = max(len(self._first_lrs), self._beams)
        capacity = max(most, len(self._ranks.share(most * len(self._factors), rank=0)))
        return Stack(self.model, names, buffers, self._optimizer, capacity)

    def _grow(self, opened: OpenEpoch, stack: Stack) -> None:
        opened.branches = [
            Branch(parent, lr * factor, math.nan) for parent, lr in enumerate(self._lrs) for factor in self._factors
        ]
        share = self._ranks.share(len(opened.branches))
        stack.select([opened.branches[index].parent for index in share])
        opened.totals = torch.zeros(len(share), dtype=torch.float64, device=stack.device)
        self._trainer.begin_epoch(stack)
