"""The choice between evaluators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..candidates import Line
from ..distributed import is_distributed
from ..isolation import Closure
from ..memory import are_small
from ..timing import seconds
from .base import Evaluator
from .folded import Folded
from .inplace import InPlace
from .stacked import Stacked
from .streamed import Streamed

__all__ = ["Auto"]


class Auto(Evaluator):
    """The fastest evaluator that serves the model, measured at the first call if that pays; else :class:`InPlace`.

    The first call evaluates the same candidates by each of them: :class:`Streamed`, :class:`Folded`,
    :class:`InPlace`, :class:`Stacked`, in the order of the memory they need, and a later one must be 5 %
    faster. Batching is not tried if the candidates take longer than a second one after another, or are three or
    fewer: so few gain nothing by it that would make up for the trial. If a copy of the parameters costs little as
    well, nothing is left to choose, and it is :class:`InPlace`.

    Nothing is measured under :func:`torch.use_deterministic_algorithms`, since a batched forward rounds
    differently: where it would be, :class:`Streamed` runs, or :class:`InPlace` if that cannot serve. On several
    ranks, which must all do the same whatever their batches, it is :class:`InPlace`.
    """

    _FASTER = 0.95
    _TOO_LONG = 1.0  # seconds
    _FEW = 3  # candidates

    def __init__(self) -> None:
        self._chosen: Evaluator | None = None
        self._why = ""

    @property
    def name(self) -> str:
        """Name of the evaluator that runs; ``"auto"`` until one is chosen."""
        return self._chosen.name if self._chosen else "auto"

    def __repr__(self) -> str:
        return f"{self.name!r}{self._why and f' (auto: {self._why})'}"

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`."""
        if self._chosen is None:
            return self._choose(model, line, factors, closure)
        if isinstance(self._chosen, InPlace):
            return self._chosen.losses(model, line, factors, closure)
        try:
            return self._chosen.losses(model, line, factors, closure)
        except RuntimeError as error:  # another kind is the closure's own
            cause = _text(error)
        return self._fall_back(model, line, factors, closure, f"evaluator {self.name!r} failed: {cause}")

    def state(self) -> dict[str, Any]:
        """Return the choice and its state: a resumed run must not choose anew."""
        return {"name": self.name, "why": self._why, "state": self._chosen.state() if self._chosen else {}}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the choice."""
        kinds = {kind.name: kind for kind in (Streamed(), Folded(), InPlace(), Stacked())}
        self._why = state["why"]
        self._chosen = kinds.get(state["name"])
        if self._chosen:
            self._chosen.load(state["state"])

    def _choose(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        if is_distributed():
            self._chosen, self._why = InPlace(), "not measured on several ranks"
            return self._chosen.losses(model, line, factors, closure)
        if len(factors) <= self._FEW and are_small(line.parameters):
            self._chosen, self._why = InPlace(), "not measured for so few candidates"
            return self._chosen.losses(model, line, factors, closure)
        streamed = Streamed()
        try:
            losses = streamed.losses(model, line, factors, closure)
        except Exception as error:
            cause = _text(error)
        else:
            self._chosen = streamed
            if torch.are_deterministic_algorithms_enabled():
                self._why = "not measured under deterministic algorithms"
            else:
                self._measure(model, line, factors, closure)
            return losses
        return self._fall_back(model, line, factors, closure, cause)

    def _measure(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> None:
        """Replace the choice, which serves, by a faster one."""
        assert self._chosen is not None
        fastest = seconds(partial(self._chosen.losses, model, line, factors, closure))
        seen = {self.name: f"{1e3 * fastest:.3g} ms"}
        refused = {}
        for evaluator in (Folded(), InPlace(), Stacked()):
            batches = not isinstance(evaluator, InPlace)
            if batches and (len(factors) <= self._FEW or fastest > self._TOO_LONG):
                continue
            try:
                evaluator.losses(model, line, factors, closure)  # checks the model, and warms up
                taken = seconds(partial(evaluator.losses, model, line, factors, closure))
            except Exception as error:
                refused[evaluator.name] = _text(error)
                continue
            seen[evaluator.name] = f"{1e3 * taken:.3g} ms"
            if taken < self._FASTER * fastest:
                self._chosen, fastest = evaluator, taken
        self._why = ", ".join(f"{name} {measured}" for name, measured in seen.items())
        if "folded" in refused and "stacked" in refused:
            self._warn(f"batching them failed: {refused['folded']}", "streamed")

    def _fall_back(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure, cause: str
    ) -> Tensor:
        in_place = InPlace()
        losses = in_place.losses(model, line, factors, closure)  # a closure at fault raises again, here
        if len(factors) > self._FEW:  # fewer would run one after another anyway
            self._warn(cause, "inplace")
        self._chosen, self._why = in_place, cause
        return losses

    def _warn(self, cause: str, instead: str) -> None:
        warnings.warn(
            f"AutoLR evaluates the candidates one after another, since {cause}. Pass evaluator={instead!r} to "
            "choose that and silence this.",
            UserWarning,
            stacklevel=2,
        )


def _text(error: Exception) -> str:
    # The exception holds the frames of the failed forward, and with them its memory.
    return str(getattr(error, "reason", f"{type(error).__name__}: {error}"))
