"""CartPole: a cart that is pushed left or right so that the pole on it stays up; many episodes at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIONS", "LONGEST", "OBSERVED", "Episodes", "play"]

ACTIONS = 2
OBSERVED = 4
"""Place and speed of the cart, angle and angular speed of the pole."""
LONGEST = 200
"""Steps of an episode in which the pole does not fall; each step has a reward of 1."""

# Barto, Sutton & Anderson (1983), in SI units, with the limits of Gym's CartPole-v0.
_GRAVITY, _CART, _POLE, _HALF_LENGTH, _FORCE, _SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
_FARTHEST, _STEEPEST = 2.4, math.radians(12)


class Episodes(NamedTuple):
    """What happened in a batch of episodes, each step of each.

    Attributes:
        observed: [S, 4], before the step.
        actions: [S].
        left: [S], steps from this one to the end of its episode, this one included.
        mean_length: of the episodes, which is their mean return.
    """

    observed: Tensor
    actions: Tensor
    left: Tensor
    mean_length: float

    def returns(self, discount: float) -> Tensor:
        """Return the discounted sum [S] of rewards from each step on."""
        return (1 - discount**self.left) / (1 - discount)


@torch.no_grad()
def play(policy: Callable[[Tensor], Tensor], count: int) -> Episodes:
    """Play episodes from random starts.

    Args:
        policy: actions [B] for what is observed [B, 4].
        count: of the episodes.
    """
    state = torch.empty(count, OBSERVED).uniform_(-0.05, 0.05)
    up = torch.ones(count, dtype=torch.bool)
    states, done, was_up = [], [], []
    while len(states) < LONGEST and up.any():
        states.append(state)
        done.append(policy(state))
        was_up.append(up)
        state = step(state, done[-1])
        up = up & (state[:, 0].abs() < _FARTHEST) & (state[:, 2].abs() < _STEEPEST)
    played = torch.stack(was_up)
    left = played.flip(0).cumsum(0).flip(0)
    return Episodes(
        torch.stack(states)[played], torch.stack(done)[played], left[played], float(left[0].double().mean())
    )


def step(state: Tensor, actions: Tensor) -> Tensor:
    """Return the states [B, 4] after a fiftieth of a second of being pushed by actions [B]."""
    _, speed, angle, turning = state.unbind(dim=1)
    force = _FORCE * (2 * actions - 1)
    mass = _CART + _POLE
    pushed = (force + _POLE * _HALF_LENGTH * turning.square() * angle.sin()) / mass
    turn = _GRAVITY * angle.sin() - angle.cos() * pushed
    turn = turn / (_HALF_LENGTH * (4 / 3 - _POLE * angle.cos().square() / mass))
    push = pushed - _POLE * _HALF_LENGTH * turn * angle.cos() / mass
    return state + _SECONDS * torch.stack([speed, push, turning, turn], dim=1)
