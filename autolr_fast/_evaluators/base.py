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
    """The evaluator cannot serve this model.

    Args:
        evaluator: its name.
        model: what it cannot serve.
        reason: why, also kept as an attribute.
    """

    def __init__(self, evaluator: str, model: nn.Module, reason: str):
        self.reason = reason
        super().__init__(
            f"evaluator {evaluator!r} cannot serve {type(model).__name__}: {reason} "
            "(evaluator='inplace' works with any model, 'auto' uses what works)"
        )


class Evaluator(ABC):
    """Evaluates one closure at every candidate of a line and leaves no trace.

    Parameters, gradients, buffers and random-number streams are bit for bit what they were when :meth:`losses`
    returns or raises.

    Attributes:
        name: of the evaluator that runs, as ``AutoLR(evaluator=...)`` takes it.
    """

    name: str

    def __repr__(self) -> str:
        return repr(self.name)

    @abstractmethod
    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the loss of each candidate.

        Args:
            model: the module the closure calls.
            line: where the candidates lie; its parameters are the model's.
            factors: N factors, one a candidate.
            closure: returns the scalar loss.

        Returns:
            [N], on the device and in the dtype of the loss.

        Raises:
            ClosureError: if the closure does not return a scalar loss, or calls backward.
        """

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to evaluate with the same bits: plain values, none by default."""
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
