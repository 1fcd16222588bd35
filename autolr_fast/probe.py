"""What one probe saw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["History", "Probe"]

_MOST = 2000  # probes of a history
_SHOWN = 7  # candidates; of more, those alone that count


@dataclass(frozen=True, repr=False, eq=False)
class Probe:
    """Holds what one probe saw along a line of candidates, and what became of the learning rate.

    Print ``scheduler.last_probe``, or read ``scheduler.history``, which has all of them.

    Attributes:
        step: optimizer steps done when the probe was made.
        window: optimizer steps that the line spans; 0 for ``direction="gradient"``.
        factors: N factors, relative to the steps that were taken. They are 2/3 and 1 of the ten steps before the
            last one, or 1 and 0 of one of the first steps. They are those of a rule, if there is one. In a search
            they are all that calibration looked at.
        losses: [N] float64, the loss of each candidate, averaged over ranks.
        weights: [N] float64, the normalised scores, which sum to 1 (0 where no loss was finite). The lowest loss
            has all the weight without a rule.
        factor: 0-dim float64, the factor by which the level moved; ``retaken`` where steps were taken again.
        lr_before: learning rate of each param group when the step was taken.
        lr_after: learning rate of each param group for the next step, annealing included.
        level_after: the same before annealing.
        evaluator: name of the evaluator that ran.
        rounds: how often losses were evaluated: more than once where steps were taken again.
        retaken: at how many times their learning rates the steps were taken again; ``None`` if parameters stayed.

    Examples:
        >>> from autolr_fast import AutoLR
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        >>> scheduler = AutoLR(optimizer, model, total_steps=100)
        >>> loss = scheduler.loss(lambda: (model(torch.ones(8, 4)) - 1).square().mean())
        >>> loss.backward()
        >>> optimizer.step()
        >>> scheduler.step()
        >>> probe = scheduler.last_probe
        >>> probe.step, probe.evaluator, probe.retaken > 1
        (1, 'inplace', True)
    """

    step: int
    window: int
    factors: tuple[float, ...]
    losses: Tensor
    weights: Tensor
    factor: Tensor
    lr_before: Sequence[float | Tensor]
    lr_after: Sequence[float | Tensor]
    level_after: Sequence[float | Tensor]
    evaluator: str
    rounds: int = 1
    retaken: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain numbers, strings and lists, for a logger or a file.

        Losses that are not finite stay so, which strict JSON has no word for. Tensors on an accelerator are read
        back.
        """
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Probe:
        """Return the probe that :meth:`to_dict` made plain."""
        tensors = {name: torch.tensor(plain[name], dtype=torch.float64) for name in ("losses", "weights", "factor")}
        return cls(**{**plain, "factors": tuple(plain["factors"]), **tensors})

    def __repr__(self) -> str:
        lrs = ", ".join(
            f"{float(a):.4g} -> {float(b):.4g}" for a, b in zip(self.lr_before, self.lr_after, strict=True)
        )
        seen = ", ".join(
            f"{factor:.4g}: {loss:.4g} ({weight:.0%})"
            for factor, loss, weight in zip(self.factors, self.losses.tolist(), self.weights.tolist(), strict=True)
            if len(self.factors) <= _SHOWN or weight > 0
        )
        taken = "" if self.retaken is None else f"retaken={self.retaken:.4g}, "
        return (
            f"Probe(step={self.step}, window={self.window}, evaluator={self.evaluator!r}, "
            f"rounds={self.rounds}, {taken}factor={float(self.factor):.4g}, lr {lrs}, losses {{{seen}}})"
        )


class History(list[Probe]):
    """The probes of a run, the first one first: of a long run evenly fewer, and all that retook steps."""

    def add(self, probe: Probe) -> None:
        """Append a probe; leave half of them out once there are too many."""
        self.append(probe)
        if len(self) > _MOST:
            self[:] = self._thinned()

    def _thinned(self) -> Iterator[Probe]:
        """Return half of them, evenly over the run, with the last one and those that retook steps."""
        gap = 2 * (self[-1].step - self[0].step) / _MOST
        due = -math.inf
        for probe in self:
            if probe.step >= due:
                due = probe.step + gap
                yield probe
            elif probe.retaken is not None or probe is self[-1]:
                yield probe

    def state(self) -> tuple[dict[str, Any], ...]:
        """Return what :meth:`read` takes: plain values."""
        return tuple(probe.to_dict() for probe in self)

    @staticmethod
    def read(state: Sequence[Mapping[str, Any]]) -> list[Probe]:
        """Return the probes of a state.

        Raises:
            ValueError: if it is none.
        """
        try:
            return [Probe.from_dict(plain) for plain in state]
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"state_dict has a history that is not known here ({error}): load it by the version that saved it"
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
