"""What one probe saw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
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
        back. ``python -m autolr_fast plot`` draws a file of JSON lines, each of them a plain probe.

        Examples:
            >>> import json
            >>> losses, weights = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0])
            >>> rates = {"lr_before": [0.1], "lr_after": [0.2], "level_after": [0.2]}
            >>> probe = Probe(7, 1, (2.0, 0.5), losses, weights, torch.tensor(2.0), **rates, evaluator="inplace")
            >>> line = json.dumps(probe.to_dict())
            >>> Probe.from_dict(json.loads(line)).losses.tolist()
            [2.0, 3.0]
        """
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Probe:
        """Return the probe that `to_dict` made plain.

        Raises:
            TypeError: if it is no dict, a key is missing or not known, or a value is of another type.
            ValueError: if lists that belong together differ in length.
        """
        if not isinstance(plain, Mapping):
            raise TypeError(f"{plain!r:.40} of type {type(plain).__name__!r} is not a dict")
        probe = cls(**plain)
        index(probe.step)
        names = ("losses", "weights", "factor")
        losses, weights, factor = (torch.tensor(getattr(probe, name), dtype=torch.float64) for name in names)
        groups = [list(map(float, rates)) for rates in (probe.lr_before, probe.lr_after, probe.level_after)]
        count = len(list(map(float, probe.factors)))
        if not count or [losses.shape, weights.shape, factor.shape] != [(count,), (count,), ()]:
            raise ValueError("factors, losses and weights are not of one length, or factor is not one number")
        if len({len(rates) for rates in groups}) > 1 or not groups[0]:
            raise ValueError("lr_before, lr_after and level_after are not of one length")
        return replace(probe, factors=tuple(probe.factors), losses=losses, weights=weights, factor=factor)

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
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"state_dict has a history that is not known here ({error}): load it by the version that saved it"
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
