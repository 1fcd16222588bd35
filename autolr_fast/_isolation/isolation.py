"""What keeps a probe from being noticed: whatever a closure touches is put back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._machine.ranks import sharded_modules
from .._ops.copies import Copies
from .closures import Closure, ClosureError, scalar_loss
from .module_states import ModuleStates
from .random_streams import RandomStreams

__all__ = ["Isolation", "check_repeatable"]


class Isolation:
    """Runs a closure any number of times as if it had never run.

    Inside the ``with`` block gradients are out of the closure's reach; at each :meth:`run` the modules (buffers,
    other attributes, train or eval mode, which parameters require a gradient) and the random-number streams
    (torch's on every initialised device, Python's, NumPy's where it is loaded) start from what they were, so all
    candidates see the same dropout masks. What the closure owns besides is its own: other modules, generators.

    Args:
        model: the module that is protected, with all its submodules.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with Isolation(model) as isolation:
        ...     loss = isolation.run(lambda: model(torch.randn(4, 2)).square().mean())
        >>> model.num_batches_tracked.item()
        0
    """

    def __init__(self, model: nn.Module):
        self._model = model

    def __enter__(self) -> Isolation:
        modules = list(self._model.modules())
        self._modules = ModuleStates(modules)
        self._random = RandomStreams()
        parameters = list(self._model.parameters())  # which may hold other than those of the modules
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        self._frozen = _copies_of_frozen(parameters)
        for parameter in parameters:
            parameter.grad = None
        self._sharded = sharded_modules(modules)
        self._reshard()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def run(self, closure: Closure, within: AbstractContextManager[Any] | None = None) -> Tensor:
        """Return the closure's loss, which autograd does not record.

        Args:
            closure: called once.
            within: what it is called inside of.

        Returns:
            The loss, 0-dim.

        Raises:
            ClosureError: if the closure does not return a scalar loss tensor, or calls backward.
        """
        with self.rewound(), torch.no_grad(), within or nullcontext():
            return scalar_loss(closure)

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Put modules, random-number streams and autocast's cache back at the end of the block."""
        # Autocast caches casts by tensor: a cast of one candidate's weights must not serve the next.
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            self._random.restore()
            torch.clear_autocast_cache()
            self._modules.restore()
            self._frozen.restore()
            # A forward without a backward leaves whole parameters behind, and they would serve the next forward.
            self._reshard()

    def _reshard(self) -> None:
        """Free the whole parameters that a sharded model gathered for a forward; there are no others to free."""
        for module in self._sharded:
            module.reshard()


def _copies_of_frozen(parameters: Sequence[nn.Parameter]) -> Copies:
    """Return the values of those that are frozen, as a momentum encoder may change them in the forward.

    A model of which little is trained, such as one with adapters, has none and could not afford the copy.
    """
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    if not frozen:
        return Copies([])
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Copies([] if sum(parameter.numel() for parameter in frozen) > trained else frozen)


def check_repeatable(model: nn.Module, closure: Closure) -> None:
    """Run the closure twice at the same weights.

    Raises:
        ClosureError: if the two losses differ: then candidates cannot be compared.
    """
    with Isolation(model) as isolation:
        first, second = (isolation.run(closure).double().clone() for _ in range(2))
    # Some GPU operations add up in another order each time.
    if not torch.allclose(first, second, rtol=1e-3, atol=0.0, equal_nan=True):
        raise ClosureError(
            f"closure returned {first.item():.6g} and then {second.item():.6g} at the same weights; all candidates "
            "must see one batch: take it outside, as in `x, y = next(batches)` and then "
            "`scheduler.loss(lambda: loss_fn(model(x), y))`; a torch.Generator of its own is not put back, so draw "
            "from the global random stream, or outside"
        )
