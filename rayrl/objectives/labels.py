"""Labels [P,G] of captions, for objectives that were written for right and wrong: from the raw
rewards, which for captions are continuous."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives import stats


def above(raw_rewards: Tensor, *, good_reward: float) -> Tensor:
    """1 where the reward is at least ``good_reward``."""
    return (raw_rewards >= good_reward).to(raw_rewards.dtype)


def above_group_mean(raw_rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 where the reward is above its group's mean; all 0 in a flat group."""
    return (stats.center(raw_rewards, valid) > 0).to(raw_rewards.dtype)


def between_extremes(raw_rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """(r - worst) / (best - worst) of the group, 1/2 in a flat one: a soft label."""
    seen = torch.ones_like(raw_rewards, dtype=torch.bool) if valid is None else valid
    low = raw_rewards.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
    high = raw_rewards.masked_fill(~seen, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (raw_rewards - low) / torch.where(spread > 0, spread, 1.0), 0.5)


def levels(raw_rewards: Tensor, *, level_width: float) -> Tensor:
    """Preference levels, higher is better: the reward in units of ``level_width``, rounded down."""
    return torch.floor(raw_rewards / level_width)
