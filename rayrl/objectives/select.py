"""Batch selection after scoring: weights [P,G] of captions, 0 drops one.

Dropped captions count in no mean.  Whether they count in their group's mean and spread is the
plan's ``statistics_of``.  ``rewards`` are the raw ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives import stats


def spread_above(rewards: Tensor, valid: Tensor, *, min_spread: float) -> Tensor:
    """Groups whose rewards have a standard deviation above ``min_spread`` (dynamic sampling, DAPO,
    2503.14476, where it is 0)."""
    return (stats.group_std(rewards, valid) > min_spread) * torch.ones_like(rewards)


def not_truncated(truncated: Tensor, rewards: Tensor) -> Tensor:
    """Captions that ended by themselves (overlong filtering, DAPO)."""
    return (~truncated).to(rewards.dtype)


def not_all_good(rewards: Tensor, valid: Tensor, *, good_reward: float) -> Tensor:
    """Groups with a caption below ``good_reward`` (NGRPO, 2509.18851, drops the solved ones)."""
    below = ((rewards < good_reward) & valid).any(1, keepdim=True)
    return below * torch.ones_like(rewards)


def best_of_group(rewards: Tensor, caption_weights: Tensor) -> Tensor:
    """The best of the captions that are left (best-of-n; SuperHF, 2310.16763,
    read in its abstract)."""
    left = caption_weights > 0
    best = rewards.masked_fill(~left, -torch.inf).argmax(1, keepdim=True)
    chosen = torch.zeros_like(rewards).scatter(1, best, 1.0)
    return chosen * left


def satisfies_judges(judge_ok: Tensor, rewards: Tensor) -> Tensor:
    """Captions that satisfy all constraints (CRRAFT, 2409.20370)."""
    return judge_ok.to(rewards.dtype)


def near_reference(
    old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_max: float
) -> Tensor:
    """Captions with log-ratio to the reference of at most ``kl_max`` (CRRAFT, 2409.20370)."""
    drift = stats.masked_sum(old_logprobs - ref_logprobs, mask)
    return (drift <= kl_max).to(old_logprobs.dtype)


def resample_by_power(
    rewards: Tensor, valid: Tensor, generator: torch.Generator, *, reward_power: float
) -> Tensor:
    """How often each caption is drawn in G draws with probability proportional to |r|^p from its
    group (PF-PPO, 2409.06957); power 0 draws nothing and keeps all."""
    if reward_power == 0:
        return torch.ones_like(rewards)
    return _draw(rewards.abs().pow(reward_power) * valid, valid, generator)


def resample_extremes(
    rewards: Tensor, valid: Tensor, generator: torch.Generator, *, other_weight: float
) -> Tensor:
    """Counts of G draws, best and worst with weight 1 and the others with ``other_weight``
    (PF-PPO's best-worst)."""
    weight = torch.full_like(rewards, other_weight)
    best = rewards.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    worst = rewards.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
    return _draw(weight.scatter(1, best, 1.0).scatter(1, worst, 1.0) * valid, valid, generator)


def resample_best(
    rewards: Tensor, valid: Tensor, generator: torch.Generator, *, best_weight: float
) -> Tensor:
    """Counts of G draws, the best with weight ``best_weight`` and the others with 0.1 (PF-PPO's
    best-random)."""
    weight = torch.full_like(rewards, 0.1)
    best = rewards.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    return _draw(weight.scatter(1, best, best_weight) * valid, valid, generator)


def balanced(rewards: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Drops captions below the group's mean at random until they are no more than those above
    (RED of 2509.24203)."""
    deviation = stats.center(rewards, valid)
    bad = (deviation < 0) & valid
    excess = (bad.sum(1) - ((deviation >= 0) & valid).sum(1)).clamp(min=0)
    draw = torch.rand(rewards.shape, generator=generator).to(rewards.device)
    rank = draw.masked_fill(~bad, 2.0).argsort(1).argsort(1)
    dropped = bad & (rank < excess[:, None])
    return (~dropped).to(rewards.dtype)


def one_reward_version(reward_versions: Tensor, valid: Tensor, rewards: Tensor) -> Tensor:
    """Groups that one version of the reward model scored; comparing captions across versions
    invents advantages (evolving rewards, 2504.20157, read in its abstract)."""
    newest = reward_versions.masked_fill(~valid, torch.iinfo(reward_versions.dtype).min)
    oldest = reward_versions.masked_fill(~valid, torch.iinfo(reward_versions.dtype).max)
    same = newest.amax(1, keepdim=True) == oldest.amin(1, keepdim=True)
    return same * torch.ones_like(rewards)


def _draw(weight: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Counts [P,G] of as many draws as the group has captions; a group without weight is kept."""
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, valid.to(weight.dtype))
    counts = torch.zeros_like(weight)
    for row, size in enumerate(valid.sum(1).tolist()):
        if size:
            drawn = torch.multinomial(
                weight[row].cpu(), size, replacement=True, generator=generator
            ).to(weight.device)
            counts[row] = counts[row].index_add(0, drawn, torch.ones_like(weight[row, drawn]))
    return counts
