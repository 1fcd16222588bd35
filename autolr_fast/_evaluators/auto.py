"""The choice between evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._isolation import Closure
from .._machine.memory import are_small
from .._machine.ranks import is_distributed
from .._machine.timing import seconds
from .._machine.warning import warn
from .._steps import Line
from .base import Evaluator
from .graphed import Graphed, check_without_waits, is_on_one_gpu
from .inplace import InPlace
from .stacked import Stacked
from .streamed import Streamed
from .substitution import is_compiled

__all__ = ["Auto"]


class Auto(Evaluator):
    """Chooses the evaluator that suits the model.

    Leave ``evaluator="auto"`` as it is, unless a run must be the same bit for bit. ``repr(scheduler)`` shows the
    measurements.

    - **Up to three candidates** are evaluated by `InPlace` if a copy of the parameters costs little, or the model
      is compiled. Others are evaluated by `Streamed`. Batching gains nothing that would make up for a trial.
    - **More candidates** are evaluated by `Streamed`, `InPlace` and `Stacked` at the first call. That is the order
      of the memory they need, and a later one must be 5 % faster. Batching is not tried if the candidates take
      longer than a second one after another.
    - **One GPU:** three candidates or more of few parameters are tried by `Graphed` too, unless the model is
      compiled. A graph must be 5 % faster than the choice so far. It then serves as many candidates and more; fewer
      gain less than its capture, once a probe, costs. The trial costs about twenty forwards, of which each probe of
      three candidates wins back one or two. The choice stays where a closure cannot be captured, and ``repr`` says
      why.
    - **Deterministic algorithms:** nothing is measured, since a batched forward rounds differently. The choice is
      `Streamed`, or `InPlace` where that cannot serve.
    - **Several ranks** must all do the same whatever their batches. The choice is `InPlace`.

    Examples:
        >>> from autolr_fast import AutoLR
        >>> model = nn.Linear(4, 1)
        >>> scheduler = AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), model, evaluator=Auto())
        >>> loss = scheduler.loss(lambda: model(torch.ones(8, 4)).square().mean())
        >>> loss.backward()
        >>> scheduler.optimizer.step()
        >>> scheduler.step()
        >>> scheduler.last_probe.evaluator
        'inplace'
    """

    name = "auto"

    _FASTER = 0.95
    _TOO_LONG = 1.0  # seconds
    _FEW = 3  # candidates
    _LEAST_GRAPHED = 3  # fewer do not pay, by the rows of benchmarks/results/gpu/probe.md

    def __init__(self) -> None:
        self._take(None)

    def __repr__(self) -> str:
        return f"{self.name!r}{self._why and f' (auto: {self._why})'}"

    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`."""
        if self._chosen is None:
            losses = self._choose(model, line, factors, closure)
            if len(factors) >= self._LEAST_GRAPHED and _may_be_graphed(model, line):
                self._try_graph(model, line, factors, closure)
            return losses
        if self._graphed is not None and len(factors) >= self._graphed_from:
            try:
                return self._graphed.losses(model, line, factors, closure)
            except RuntimeError as error:
                self._take(self._chosen, f"{self._why}; graphed failed: {_text(error)}")
        try:
            return self._chosen.losses(model, line, factors, closure)
        except RuntimeError as error:  # another kind is the closure's own
            if isinstance(self._chosen, InPlace):
                raise
            cause = f"evaluator {self._chosen.name!r} failed: {_text(error)}"
        return self._fall_back(model, line, factors, closure, cause)

    def state(self) -> dict[str, Any]:
        """Return the choice and its state: a resumed run must not choose anew."""
        if self._chosen is None:
            return {"name": "auto", "why": self._why, "state": ()}
        state = self._chosen.state()
        if self._graphed is not None:
            state[_GRAPHED_FROM] = self._graphed_from
        return {"name": self._chosen.name, "why": self._why, "state": tuple(state.items())}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the choice."""
        kind = {kind.name: kind for kind in (Streamed, InPlace, Stacked)}.get(state["name"])
        own = dict(state["state"])
        graphed_from = own.pop(_GRAPHED_FROM, None)
        self._take(kind() if kind else None, state["why"])
        if self._chosen:
            self._chosen.load(own)
        if graphed_from is not None:
            self._take_graph(Graphed(), graphed_from)

    def _take(self, evaluator: Evaluator | None, why: str = "") -> None:
        self._chosen = evaluator
        self._why = why
        self.name = evaluator.name if evaluator else "auto"
        self._graphed: Graphed | None = None
        self._graphed_from = 0  # candidates

    def _take_graph(self, graphed: Graphed, candidates: int) -> None:
        """Evaluate so many candidates and more by a graph; fewer as before."""
        self._graphed, self._graphed_from = graphed, candidates
        self.name = graphed.name

    def _try_graph(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> None:
        """Take a graph if it is faster than what was chosen, which is warm."""
        assert self._chosen is not None
        graphed = Graphed()
        try:
            least = seconds(partial(self._chosen.losses, model, line, factors, closure))
            if least > self._TOO_LONG:
                return
            check_without_waits(model, closure)
            graphed.losses(model, line, factors, closure)  # checks the model, and warms up
            taken = seconds(partial(graphed.losses, model, line, factors, closure))
        except StopIteration:  # the closure's own
            raise
        except Exception as error:
            self._why += f"; not graphed, since {_text(error)}"
            return
        self._why += f"; graphed {1e3 * taken:.3g} ms against {1e3 * least:.3g} ms"
        if taken < self._FASTER * least:
            self._why += f", {self.name} for fewer than {len(factors)} candidates"
            self._take_graph(graphed, len(factors))

    def _choose(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        why = ""
        if is_distributed():
            why = "not measured on several ranks"
        elif len(factors) <= self._FEW and (are_small(line.parameters) or is_compiled(model)):
            why = "not measured for so few candidates"
        if why:
            in_place = InPlace()
            losses = in_place.losses(model, line, factors, closure)
            self._take(in_place, why)
            return losses
        streamed = Streamed()
        try:
            losses = streamed.losses(model, line, factors, closure)
        except Exception as error:
            cause = _text(error)
        else:
            if len(factors) <= self._FEW:
                self._take(streamed, "not measured for so few candidates")
            elif torch.are_deterministic_algorithms_enabled():
                self._take(streamed, "not measured under deterministic algorithms")
            else:
                self._measure(streamed, model, line, factors, closure)
            return losses
        return self._fall_back(model, line, factors, closure, cause)

    def _measure(
        self, streamed: Streamed, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure
    ) -> None:
        """Choose the fastest; ``streamed`` serves, and is warm."""
        fastest: Evaluator = streamed
        least = seconds(partial(streamed.losses, model, line, factors, closure))
        measured = [f"streamed {1e3 * least:.3g} ms"]
        refused = ""
        for evaluator in (InPlace(), Stacked()):
            batches = isinstance(evaluator, Stacked)
            if batches and least > self._TOO_LONG:
                continue
            try:
                evaluator.losses(model, line, factors, closure)  # checks the model, and warms up
                taken = seconds(partial(evaluator.losses, model, line, factors, closure))
            except StopIteration:  # the closure's own
                raise
            except Exception as error:
                refused = _text(error) if batches else ""
                continue
            measured.append(f"{evaluator.name} {1e3 * taken:.3g} ms")
            if taken < self._FASTER * least:
                fastest, least = evaluator, taken
        self._take(fastest, ", ".join(measured))
        if refused:
            self._warn(f"batching them failed: {refused}", "streamed")

    def _fall_back(
        self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure, cause: str
    ) -> Tensor:
        in_place = InPlace()
        losses = in_place.losses(model, line, factors, closure)  # a closure at fault raises again, here
        if len(factors) > self._FEW:  # fewer would run one after another anyway
            self._warn(cause, "inplace")
        self._take(in_place, cause)
        return losses

    def _warn(self, cause: str, instead: str) -> None:
        warn(
            f"AutoLR evaluates the candidates one after another, since {cause}. Pass evaluator={instead!r} to "
            "choose that and silence this."
        )


_GRAPHED_FROM = "graphed_from"


def _may_be_graphed(model: nn.Module, line: Line) -> bool:
    """Whether a CUDA graph can run the model, and a copy of the parameters costs little."""
    return (
        is_on_one_gpu(line.parameters)
        and are_small(line.parameters)
        and not (is_distributed() or is_compiled(model) or torch.are_deterministic_algorithms_enabled())
    )


def _text(error: Exception) -> str:
    # The exception holds the frames of the failed forward, and with them its memory.
    return str(getattr(error, "reason", f"{type(error).__name__}: {error}"))
