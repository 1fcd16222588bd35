"""What keeps a probe from being noticed: whatever a closure touches is put back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._machine.ranks import sharded_modules
from .._ops.copies import Copies
from .closures import CALLED_BACKWARD, Closure, ClosureError, scalar_loss
from .held import Held, Versions, modules_beside
from .inventory import Inventory, inventory_of
from .module_states import ModuleStates
from .probed import probed
from .random_streams import RandomStreams

__all__ = ["Isolation", "check_repeatable"]


class Isolation:
    """Runs a closure any number of times as if it had never run.

    Inside the ``with`` block gradients are out of the closure's reach; at each :meth:`run` the modules (buffers,
    other attributes, train or eval mode, which parameters require a gradient) and the random-number streams
    (torch's on every initialised device, Python's, NumPy's where it is loaded) start from what they were, so all
    candidates see the same dropout masks. The modules that the closure holds beside the model are put back too; the
    tensors that it holds may not change. What it owns besides is its own: generators, counters.

    Args:
        model: the module that is protected, with all its submodules.
        closure: that is to run; what it holds is found here.

    Attributes:
        modules: that are protected, inside the ``with`` block.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with Isolation(model) as isolation:
        ...     loss = isolation.run(lambda: model(torch.randn(4, 2)).square().mean())
        >>> model.num_batches_tracked.item()
        0
    """

    def __init__(self, model: nn.Module, closure: Closure | None = None):
        self._model = model
        self._closure = closure

    def __enter__(self) -> Isolation:
        held, known, inventory = Held(), None, None
        if self._closure is not None:
            known = probed(self._closure)
            held, inventory = known.held(), known.inventory
        inventory = inventory_of(self._model, inventory)
        if known is not None:
            known.inventory = inventory
        self._needs_gradients = known is not None and known.needs_gradients
        self._rewinds = known is not None and known.rewinds
        beside = modules_beside(inventory.modules, held)
        self.modules = [*inventory.modules, *beside]
        self._states = [ModuleStates(inventory), *([ModuleStates(beside)] if beside else [])]
        self._versions = Versions(held)
        self._random = RandomStreams()
        parameters = _parameters_of(self._model, inventory)
        others = [each for module in beside for each in module._parameters.values() if each is not None]
        leaves = [tensor for _, tensor in held.tensors if tensor.requires_grad and tensor.is_leaf]
        self._gradients = [
            (leaf, leaf.grad) for leaf in {id(each): each for each in parameters + others + leaves}.values()
        ]
        self._frozen = _copies_of_frozen(parameters, others)
        for leaf, _ in self._gradients:
            leaf.grad = None
        self._sharded = sharded_modules(self.modules)
        self._reshard()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._rewinds:
            self._random.restore()
        for leaf, gradient in self._gradients:
            leaf.grad = gradient

    def run(self, closure: Closure, within: AbstractContextManager[Any] | None = None) -> Tensor:
        """Return the closure's loss, which autograd does not record.

        Args:
            closure: called once.
            within: what it is called inside of.

        Returns:
            The loss, 0-dim.

        Raises:
            ClosureError: if the closure does not return a scalar loss tensor, calls backward, or writes to a tensor
                that it holds.
        """
        with torch.no_grad(), self.rewound(), within or nullcontext():
            return scalar_loss(closure).detach()

    @contextmanager
    def rewound(self, gradients: bool = False) -> Iterator[None]:
        """Put modules, random-number streams and autocast's cache back at the end of the block.

        The streams wait for the end of the isolation if each run of the closure begins by setting them.

        Args:
            gradients: whether they are on inside, also if the closure does not need them.

        Raises:
            ClosureError: if the closure called backward, or wrote to a tensor that it holds.
        """
        # Autocast caches casts by tensor: a cast of one candidate's weights must not serve the next.
        torch.clear_autocast_cache()
        try:
            with self._recording() if gradients or self._needs_gradients else nullcontext():
                yield
        finally:
            if not self._rewinds:
                self._random.restore()
            torch.clear_autocast_cache()
            for states in self._states:
                states.restore()
            for copies in self._frozen:
                copies.restore()
            # A forward without a backward leaves whole parameters behind, and they would serve the next forward.
            self._reshard()
        if any(leaf.grad is not None for leaf, _ in self._gradients):
            raise ClosureError(CALLED_BACKWARD)
        self._versions.check(self.modules)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.modules:
                if isinstance(module, DistributedDataParallel):  # it would wait for a backward that never comes
                    stack.enter_context(module.no_sync())
            stack.enter_context(torch.enable_grad())
            yield

    def _reshard(self) -> None:
        """Free the whole parameters that a sharded model gathered for a forward; there are no others to free."""
        for module in self._sharded:
            module.reshard()


def _parameters_of(model: nn.Module, inventory: Inventory) -> list[nn.Parameter]:
    """Return the parameters of a model, which may have others than those of its modules."""
    is_usual = type(model).parameters is nn.Module.parameters
    if is_usual and type(model).named_parameters is nn.Module.named_parameters:
        return inventory.parameters
    return list(model.parameters())


def _copies_of_frozen(own: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[Copies]:
    """Return the values of those that are frozen, as a momentum encoder may change them in the forward.

    A model of which little is trained, such as one with adapters, has none and could not afford the copy.

    Args:
        own: parameters of the model.
        others: of modules beside it.
    """
    frozen = [[parameter for parameter in each if not parameter.requires_grad] for each in (own, others)]
    if not any(frozen):
        return []
    trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    return [Copies(each) for each in frozen if sum(parameter.numel() for parameter in each) <= trained]


def check_repeatable(model: nn.Module, closure: Closure) -> Tensor:
    """Run the closure twice at the same weights, and return its loss, 0-dim float64.

    Raises:
        ClosureError: if the two losses differ: then candidates cannot be compared.
    """
    with Isolation(model, closure) as isolation:
        first, second = [isolation.run(closure).double().clone() for _ in range(2)]
    # Some GPU operations add up in another order each time.
    if not torch.allclose(first, second, rtol=1e-3, atol=0.0, equal_nan=True):
        raise ClosureError(
            f"closure returned {first.item():.6g} and then {second.item():.6g} at the same weights; all candidates "
            "must see one batch: take it outside, as in `x, y = next(batches)` and then "
            "`scheduler.loss(lambda: loss_fn(model(x), y))`; a torch.Generator of its own is not put back, so draw "
            "from the global random stream, or outside"
        )
    return first
