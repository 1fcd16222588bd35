"""What an evaluator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .._isolation import Closure
from .._steps import Line

__all__ = ["Evaluator", "EvaluatorError"]


class EvaluatorError(RuntimeError):
    """Says that an evaluator cannot serve a model.

    Choose another evaluator by the names in the message. An evaluator asked for by name never falls back.

    Args:
        evaluator: the name of the evaluator.
        model: the model that the evaluator cannot serve.
        reason: the cause, also kept as an attribute.

    Examples:
        >>> error = EvaluatorError("graphed", nn.Linear(4, 1), "its parameters are on cpu, not on one CUDA GPU")
        >>> error.reason
        'its parameters are on cpu, not on one CUDA GPU'
    """

    def __init__(self, evaluator: str, model: nn.Module, reason: str):
        self.reason = reason
        super().__init__(
            f"evaluator {evaluator!r} cannot serve {type(model).__name__}: {reason} "
            "(evaluator='inplace' works with any model, 'auto' uses what works)"
        )


class Evaluator(ABC):
    """Evaluates one closure at every candidate of a line, and leaves no trace.

    Give one to ``AutoLR(evaluator=...)``. Parameters, gradients, buffers and random-number streams are bit for bit
    the same when `losses` returns or raises.

    Attributes:
        name: the name of the evaluator that runs, as ``AutoLR(evaluator=...)`` takes it.

    Examples:
        >>> from autolr_fast import InPlace, Streamed
        >>> [evaluator.name for evaluator in (InPlace(), Streamed())]
        ['inplace', 'streamed']
    """

    name: str

    def __repr__(self) -> str:
        return repr(self.name)

    @abstractmethod
    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the loss of each candidate.

        Args:
            model: the module that the closure calls.
            line: the line of the candidates; its parameters are the model's.
            factors: N factors, one a candidate.
            closure: returns the scalar loss.

        Returns:
            [N], on the device and in the dtype of the loss.

        Raises:
            ClosureError: if the closure does not return a scalar loss, or calls backward.
        """

    def state(self) -> dict[str, Any]:
        """Return the plain values that a resumed run needs to evaluate with the same bits; none by default."""
        return {}

    def check(self, state: dict[str, Any]) -> None:
        """Raise a ValueError if :meth:`load` cannot take a state; nothing is changed."""
        if set(state) != set(self.state()):
            raise ValueError(
                f"state_dict is of an evaluator with the state {state}, and {self.name!r} has {self.state()}: give "
                "AutoLR the same evaluator"
            )

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027, an evaluator without state is complete
        """Take over what :meth:`state` returned."""
