"""The choice between evaluators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..candidates import Line
from ..isolation import Closure
from .base import Evaluator
from .inplace import InPlace
from .stacked import Stacked

__all__ = ["Auto"]


class Auto(Evaluator):
    """:class:`Stacked` as long as it works; from its first failure on :class:`InPlace`, with one warning."""

    def __init__(self) -> None:
        self._chosen: Evaluator = Stacked()

    @property
    def name(self) -> str:
        """Name of the evaluator that runs."""
        return self._chosen.name

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`."""
        if isinstance(self._chosen, InPlace):
            return self._chosen.losses(model, line, factors, closure)
        try:
            return self._chosen.losses(model, line, factors, closure)
        except RuntimeError as error:  # another kind is the closure's own
            # As text: the exception holds the frames of the failed forward, and with them its memory.
            cause = getattr(error, "reason", f"{type(error).__name__}: {error}")
        in_place = InPlace()
        losses = in_place.losses(model, line, factors, closure)  # a closure at fault raises again, here
        warnings.warn(
            f"AutoLR evaluates the candidates one after another, since batching them failed: {cause}. "
            "Pass evaluator='inplace' to choose that and silence this.",
            UserWarning,
            stacklevel=2,
        )
        self._chosen = in_place
        return losses

    def state(self) -> dict[str, Any]:
        """Return the choice and its state: a resumed run must not choose anew."""
        return {"name": self.name, "state": self._chosen.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the choice."""
        self._chosen = InPlace() if state["name"] == "inplace" else Stacked()
        self._chosen.load(state["state"])
