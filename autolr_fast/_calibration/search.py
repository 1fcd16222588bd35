"""The first rate: the search along the first step for the scale where the loss is lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from .._evaluators.prober import Look

__all__ = ["Found", "LookAt", "has_blown_up", "has_risen", "search", "search_again"]

LookAt = Callable[[Sequence[float]], Look]
"""From ratios to the step that was taken to what these candidates say."""

_STRIDE = 4.0  # from one ratio of the scan to the next
_SHORTEST = -10  # power of it, times the longest: six decades below
_LONGER = 3  # powers up, up to which it is looked for a step that can be seen
_FURTHEST = 12  # power up to which the scan goes on while the loss still falls
_PROPORTIONAL = (0.15, 0.4)  # of a step's fall, that one as long as a quarter has: there is no minimum below these
_UNSEEN = range(_SHORTEST, _SHORTEST + 3)  # powers of steps so short that what they change the loss by is noise
_CLEAR = 3.0  # times that noise is a fall, and
_LEAST = 1e-5  # of the loss
_PLAIN = 10.0  # times as much is one whatever the noise of other short steps
_LONGEST = 0.125  # of the parameters' length: networks want first steps of 0.01 to 0.2, and longer ones forget
_DEEP = 0.5  # of the deepest fall up to there: a nearer minimum that is as deep is preferred
_LEVEL = 1.1  # times the fall so far, that a step four times as long has to reach: else the loss has levelled off
_NEARLY = 0.995  # of the deepest fall: a shorter step that wins as much is preferred
_WIDTH = 2.0  # how far around the best is looked then
_KNOWN = 1.2  # times the best: a minimum that is nearer is not looked at, as the probes to come find it
_BLOWN_UP = 4  # times as high a loss as the lowest of earlier steps, while
_SHARE = 0.5  # of its size is the least by which such steps raise that of their batch: several do it together
_SHORTENED = range(-5, 0)  # powers of the stride, of steps that are taken again


class Found(NamedTuple):
    """Where a search ended.

    Attributes:
        ratio: to the step that was taken, where the loss is lowest.
        taken: ratio at which the step is to be taken: 0 undoes it, 1 leaves it as it is.
        cost: there.
        factors: all ratios that were looked at, in order.
        losses: at these.
        rounds: looks in all.
        why_not: why no ratio was found; empty if one was.
        is_endless: whether that is because the loss has no minimum.
    """

    ratio: float
    taken: float
    cost: float
    factors: Sequence[float]
    losses: Sequence[float]
    rounds: int
    why_not: str = ""
    is_endless: bool = False


def search(
    look: LookAt,
    at_once: int,
    step: float,
    begin: float,
    *,
    highest: float = math.inf,
    is_known: bool = False,
) -> Found:
    """Scan the lengths that a step may have, from the longest down, and look closer at the nearest deep minimum.

    The longest step is an eighth of the parameters. The scan ends where the loss falls in proportion to the step:
    shorter ones hold no minimum. Where it looks does not depend on the step that was taken. Longer steps are looked
    at while the loss still falls; one that falls for as far as is looked has no minimum. A loss that levels off
    counts as one that rises. Of several minima the nearest one is taken that is half as deep as the deepest.

    Args:
        look: from ratios to what these candidates say; 0 is where the step began.
        at_once: candidates of a look.
        step: length of the step that was taken.
        begin: length of the parameters where it began; where that is 0, any step is short enough.
        highest: largest ratio at which the step may be taken.
        is_known: whether the loss where it began is, so that it takes no evaluation.

    Example:
        >>> import torch
        >>> def look(ratios):  # the best ratio is 8000
        ...     losses = torch.tensor([(ratio / 8000 - 1) ** 2 for ratio in ratios])
        ...     return Look(ratios, losses, costs=losses, precision=1e-7)
        >>> found = search(look, at_once=2, step=1e-5, begin=1.0)
        >>> round(found.ratio), found.rounds
        (8000, 5)
    """
    scan = _Scan(look, at_once)
    has_length = 0 < step < math.inf
    unit = _LONGEST * (begin or 1.0) / step if has_length else 1.0
    if has_length:
        scan.descend(unit, is_known)
    else:
        scan.at([0.0, 1.0])
    if has_length and math.isfinite(scan.began):
        scan.widen(unit)
    longest = unit if begin and has_length else math.inf
    best = scan.nearest_minimum(up_to=longest)
    is_endless = math.isfinite(scan.began) and scan.falls_to_the_end()
    why_not = ""
    if not math.isfinite(scan.began):
        why_not = f"the loss was {scan.loss(0.0)} before the step: check the batch"
    elif scan.is_flat():
        why_not = _FLAT
    elif is_endless:
        why_not = _ENDLESS
    elif not (scan.is_plain(best) or scan.is_clear(best, unit)):
        why_not = "no scale of the step clearly lowers the loss of its batch"
    if why_not:
        scan.at([1.0])
        stays = scan.cost(1.0) <= scan.began and math.isfinite(step)  # what raised the loss does not
        taken = 1.0 if stays else 0.0
        return scan.found(1.0, taken, why_not, is_endless)
    best = min(scan.closer(best), longest)
    taken = min(best, highest)
    if taken not in scan.ratios():
        scan.at([taken])
    return scan.found(best, taken if scan.fall(taken) > 0 else scan.lowest(up_to=taken))


def search_again(look: LookAt, cost: float, before: float, most: float | None = None) -> Found | None:
    """Find how long the last steps had better been, if the loss blew up in them.

    A rate that suits the first step may be far too high for the fifth, and then each step multiplies the loss; no
    lower rate brings back a network that is lost.

    Args:
        look: from factors of the steps to what these candidates say.
        cost: about where the steps ended: what tells whether to look at all.
        before: the lowest of earlier steps, with other batches.
        most: as of :func:`has_blown_up`.

    Returns:
        ``None`` if the loss did not blow up, or the steps raised that of their batch by less than ``most`` (half of
        its size if not given), or it is not finite where they began.
    """
    if not has_blown_up(cost, before, most):
        return None
    scan = _Scan(look, at_once=2)
    scan.at([1.0, 0.0])
    if not (math.isfinite(scan.began) and has_risen(scan.cost(1.0), scan.began, most)):
        return None
    scan.at([_STRIDE**power for power in _SHORTENED])
    best = scan.lowest()
    best = scan.closer(best) if best else best
    return scan.found(best, best)


def has_risen(loss: float, began: float, most: float | None = None) -> bool:
    """Whether steps raised the loss of their batch enough to be to blame; ``most`` as of :func:`search_again`."""
    return has_blown_up(loss, began, _SHARE * abs(began) if most is None else most)


def has_blown_up(loss: float, before: float, most: float | None = None) -> bool:
    """Whether a loss is not finite, or too far above another.

    Args:
        loss: after steps.
        before: before these.
        most: by how much it may rise; ``None`` for three times the size of ``before``, to four times as much.
    """
    return not loss - before <= ((_BLOWN_UP - 1) * abs(before) if most is None else most)


_FLAT = (
    "all candidates have the same loss. Either the step is below the precision of the loss: start from a higher "
    "learning rate. Or the closure returns a loss that was computed before: call the model inside, as in "
    "scheduler.loss(lambda: loss_fn(model(x), y))"
)
_ENDLESS = (
    "the loss falls for as far as the step can be followed, as that of a policy gradient does. It has no minimum "
    "that a rate could be found by"
)


class _Scan:
    """What a search knows.

    Args:
        look: from ratios to what these candidates say.
        at_once: candidates of a look.
    """

    def __init__(self, look: LookAt, at_once: int):
        self._look = look
        self._at_once = at_once
        self._costs: dict[float, float] = {}
        self._losses: dict[float, float] = {}
        self._precision = 0.0
        self._rounds = 0
        self._unseen: list[float] = []  # ratios of steps so short that what they change the loss by is noise

    def at(self, ratios: Sequence[float]) -> None:
        """Look at some ratios."""
        for start in range(0, len(ratios), self._at_once):
            self._look_at(ratios[start : start + self._at_once])

    def _look_at(self, ratios: Sequence[float]) -> None:
        seen = self._look(tuple(ratios))
        costs = (math.inf if math.isnan(cost) else cost for cost in seen.costs.tolist())
        self._costs.update(zip(seen.factors, costs, strict=True))
        self._losses.update(zip(seen.factors, seen.losses.tolist(), strict=True))
        self._precision = seen.precision
        self._rounds += 1

    def descend(self, unit: float, is_known: bool) -> None:
        """Look at where the step began, and at ever shorter ones until the loss falls in proportion to them.

        Args:
            unit: ratio of the longest.
            is_known: as of :func:`search`: the first look is at one more candidate then.
        """
        self._unseen = [unit * _STRIDE**_SHORTEST]
        lengths = [unit * _STRIDE**power for power in range(0, _SHORTEST, -1)]
        ratios = [lengths[0], *self._unseen, *lengths[1:]]
        for start in range(-1 + is_known, len(ratios), self._at_once):
            ahead = ratios[max(start, 0) : start + self._at_once]
            self._look_at(ahead if 0.0 in self._costs else [0.0, *ahead])
            known = [ratio for ratio in lengths if ratio in self._costs]
            if not math.isfinite(self.began) or self._fall_in_proportion(known[-3:]):
                return

    def _fall_in_proportion(self, ratios: Sequence[float]) -> bool:
        """Whether the fall of the loss goes about with the length of the step, over three ratios."""
        least, most = _PROPORTIONAL
        falls = [self.fall(ratio) for ratio in ratios]
        return (
            len(falls) == 3
            and falls[-1] > 0
            and falls[0] > self._rounding()
            and all(least <= shorter / longer <= most for longer, shorter in pairwise(falls))
        )

    def widen(self, unit: float) -> None:
        """Look at longer steps while the loss still falls, or while none was long enough to be seen."""
        for power in range(1, _FURTHEST):
            has_fallen = self.fall(self.lowest()) > self._noise()
            if not self.falls_to_the_end() and (has_fallen or power > _LONGER):
                break
            self.at([unit * _STRIDE**power])

    def closer(self, best: float) -> float:
        """Look around the best, and where a parabola through it and its neighbours is lowest; return the best."""
        around = [best / _WIDTH, best, best * _WIDTH]
        self.at([around[0], around[2]])
        most = max(map(self.fall, around))
        best = next(ratio for ratio in around if self.fall(ratio) >= _NEARLY * most)
        vertex = _vertex(self._costs, best)
        if 1 / _KNOWN <= vertex / best <= _KNOWN:
            return best
        self.at([vertex])
        return min([best, vertex], key=self.cost)

    def found(self, ratio: float, taken: float, why_not: str = "", is_endless: bool = False) -> Found:
        """Return that the search ended here."""
        factors, losses = zip(*sorted(self._losses.items()), strict=True)
        return Found(ratio, taken, self.cost(taken), factors, losses, self._rounds, why_not, is_endless)

    @property
    def began(self) -> float:
        """The cost where the step began."""
        return self.cost(0.0)

    def cost(self, ratio: float) -> float:
        """Return the cost at a ratio that was looked at."""
        return self._costs[ratio]

    def loss(self, ratio: float) -> float:
        """Return the loss at a ratio that was looked at."""
        return self._losses[ratio]

    def fall(self, ratio: float) -> float:
        """Return by how much the cost at a ratio is below where the step began."""
        return self.began - self.cost(ratio)

    def ratios(self) -> list[float]:
        """Return the ratios that were looked at, in order, without 0."""
        return sorted(self._costs.keys() - {0.0})

    def lowest(self, up_to: float = math.inf) -> float:
        """Return the ratio of the lowest cost; the smallest of several, 0 included."""
        return min((ratio for ratio in sorted(self._costs) if ratio <= up_to), key=self.cost)

    def nearest_minimum(self, up_to: float = math.inf) -> float:
        """Return the smallest ratio at which the loss has fallen far, and falls no further for a while."""
        deepest = self.fall(self.lowest(up_to))
        ratios = [ratio for ratio in self.ratios() if ratio <= up_to]
        for ratio, further in pairwise(ratios):
            if self.fall(ratio) >= _DEEP * deepest and not self.fall(further) > _LEVEL * self.fall(ratio):
                return ratio
        return ratios[-1]

    def falls_to_the_end(self) -> bool:
        """Whether the loss still falls where the scan ended."""
        last = self.ratios()[-1]
        if self.cost(self.lowest()) == -math.inf:
            return True
        return self.nearest_minimum() == last and self.fall(last) > self._noise()

    def is_clear(self, ratio: float, unit: float) -> bool:
        """Whether the loss has fallen by more than the noise, which more steps too short to be seen now show."""
        self._unseen = [unit * _STRIDE**power for power in _UNSEEN]
        self.at([each for each in self._unseen if each not in self._costs])
        return self.fall(ratio) > self._noise()

    def is_plain(self, ratio: float) -> bool:
        """Whether the loss has fallen by so much that one step too short to be seen says enough of the noise."""
        return self.fall(ratio) > _PLAIN * self._noise()

    def _noise(self) -> float:
        """Return what a fall of the loss has to exceed: steps too short to be seen change the loss by rounding."""
        unseen = max((abs(self.cost(ratio) - self.began) for ratio in self._unseen), default=0.0)
        return max(_CLEAR * unseen, self._rounding())

    def _rounding(self) -> float:
        return max(2 * self._precision, _LEAST) * abs(self.began)

    def is_flat(self) -> bool:
        """Whether all losses are finite and differ by rounding at most."""
        low, high = min(self._costs.values()), max(self._costs.values())
        return math.isfinite(high) and high - low <= 2 * self._precision * max(abs(low), abs(high))


def _vertex(known: Mapping[float, float], best: float) -> float:
    """Return where a parabola through the best and its neighbours is lowest, if that is between these."""
    below = max((other for other in known if other < best), default=best)
    above = min((other for other in known if other > best), default=best)
    if best in (below, above):
        return best
    down, up = best - below, above - best
    falls, rises = (known[below] - known[best]) / down, (known[above] - known[best]) / up
    if not falls + rises > 0:
        return best
    vertex = best + (falls * up - rises * down) / (2 * (falls + rises))
    return vertex if below < vertex < above else best
