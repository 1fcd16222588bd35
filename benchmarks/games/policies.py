"""Policy gradients on a contextual bandit and on CartPole: losses without a lower bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from .cartpole import ACTIONS, OBSERVED, play
from .players import Player, Setting, perceptron

__all__ = ["bandit", "ppo", "reinforce"]

_CONTEXT, _ARMS, _PULLS, _JUDGED = 8, 5, 64, 4000
_WIDTH = 64
_EPISODES = 16
_DISCOUNT, _CLIP, _EPOCHS, _MINIBATCHES = 0.99, 0.2, 4, 4


def bandit(setting: Setting) -> tuple[dict[str, float], list[Player]]:
    """Learn which of five arms pays most in a context, by REINFORCE with the batch's mean as baseline."""
    pays = torch.randn(_CONTEXT, _ARMS)
    policy = perceptron(_CONTEXT, _WIDTH, _ARMS, nn.Tanh)
    player = _player(policy, setting, setting.steps)
    for _ in range(setting.steps):
        contexts = torch.randn(_PULLS, _CONTEXT)
        actions = _sample(policy, contexts)
        paid = _chosen(contexts @ pays, actions) + torch.randn(_PULLS)
        batch = _Batch(contexts, actions, paid - paid.mean())
        player.move(lambda batch=batch: _policy_loss(policy, batch))
    contexts = torch.randn(_JUDGED, _CONTEXT)
    paid, best = _chosen(contexts @ pays, _sample(policy, contexts)), (contexts @ pays).amax(dim=1)
    return {"reward, % of the best": 100 * float(paid.sum() / best.sum())}, [player]


def reinforce(setting: Setting) -> tuple[dict[str, float], list[Player]]:
    """Balance the pole by REINFORCE (Williams, 1992) on discounted returns, one step a batch of episodes."""
    policy = perceptron(OBSERVED, _WIDTH, ACTIONS, nn.Tanh)
    player = _player(policy, setting, setting.steps)
    for _ in range(setting.steps):
        episodes = play(lambda observed: _sample(policy, observed), _EPISODES)
        returns = episodes.returns(_DISCOUNT)
        batch = _Batch(episodes.observed, episodes.actions, (returns - returns.mean()) / (returns.std() + 1e-6))
        player.move(lambda batch=batch: _policy_loss(policy, batch))
    return _mean_return(policy), [player]


def ppo(setting: Setting) -> tuple[dict[str, float], list[Player]]:
    """Balance the pole by the clipped surrogate of PPO (Schulman et al., 2017), with a critic, without entropy."""
    actor, critic = perceptron(OBSERVED, _WIDTH, ACTIONS, nn.Tanh), perceptron(OBSERVED, _WIDTH, 1, nn.Tanh)
    model = nn.ModuleList([actor, critic])
    player = _player(model, setting, setting.steps * _EPOCHS * _MINIBATCHES)
    for _ in range(setting.steps):
        episodes = play(lambda observed: _sample(actor, observed), _EPISODES)
        returns = episodes.returns(_DISCOUNT) * (1 - _DISCOUNT)  # a mean of rewards, at most 1
        with torch.no_grad():
            likely = _log_likelihoods(actor, episodes.observed, episodes.actions)
            advantages = returns - critic(episodes.observed).squeeze(1)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        for _ in range(_EPOCHS):
            for part in torch.randperm(len(returns)).chunk(_MINIBATCHES):
                batch = _Batch(episodes.observed[part], episodes.actions[part], advantages[part])
                player.move(
                    lambda batch=batch, likely=likely[part], returns=returns[part]: (
                        _clipped_loss(actor, batch, likely) + F.mse_loss(critic(batch.observed).squeeze(1), returns)
                    )
                )
    return _mean_return(actor), [player]


class _Batch(NamedTuple):
    """What was seen [B, ...], what was done [B], and how much better that was than expected [B]."""

    observed: Tensor
    actions: Tensor
    advantages: Tensor


def _player(model: nn.Module, setting: Setting, steps: int) -> Player:
    return Player("policy", Adam(model.parameters(), setting.lr), model, setting.method, steps)


def _policy_loss(policy: nn.Module, batch: _Batch) -> Tensor:
    return -(_log_likelihoods(policy, batch.observed, batch.actions) * batch.advantages).mean()


def _clipped_loss(policy: nn.Module, batch: _Batch, likely: Tensor) -> Tensor:
    ratios = (_log_likelihoods(policy, batch.observed, batch.actions) - likely).exp()
    clipped = ratios.clamp(1 - _CLIP, 1 + _CLIP)
    return -torch.minimum(ratios * batch.advantages, clipped * batch.advantages).mean()


def _log_likelihoods(policy: nn.Module, observed: Tensor, actions: Tensor) -> Tensor:
    return _chosen(policy(observed).log_softmax(dim=1), actions)


def _chosen(values: Tensor, actions: Tensor) -> Tensor:
    return values.gather(1, actions[:, None]).squeeze(1)


@torch.no_grad()
def _sample(policy: nn.Module, observed: Tensor) -> Tensor:
    """Return actions [B]; those of a policy that is lost are valid too."""
    logits = policy(observed)
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(dim=1)


def _mean_return(policy: nn.Module) -> dict[str, float]:
    return {"mean return of 200": play(lambda observed: _sample(policy, observed), count=64).mean_length}
