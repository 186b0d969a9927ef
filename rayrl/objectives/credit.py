"""Advantages of single tokens [P,G,T]: prefix trees, segments, returns and critics."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives import stats
from rayrl.objectives.tokens import (
    at_last_token,
    first_token,
    last_segment,
    last_token,
    prefix_tree_values,
    segment_values,
)

_CERTAIN = 1e-6
"""An energy of a token that may be rounding of float32 alone."""


def prefix_tree(
    rewards: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    valid: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """(r - mean + V(t+1) - V(t)) / (std + eps), V the mean reward of the captions that share the
    prefix (TEMPO, 2509.18314): where captions part, the branch that did better is credited."""
    values = prefix_tree_values(rewards, token_ids, mask, valid)
    spread = stats.group_std(rewards, valid) + eps
    credit = stats.center(rewards, valid)[..., None] + values.diff(dim=-1)
    flat = (stats.center(rewards, valid) == 0).all(1)[:, None, None]
    return torch.where(mask & ~flat, credit / spread[..., None], 0.0)


def segment_gain(
    rewards: Tensor,
    prefix_values: Tensor,
    segments: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """V(end) - V(start) of the token's segment, the first V being the group's mean and the last one
    the reward, so that a caption's segments add up to r - mean (SPO, 2505.23564).

    prefix_values: [P,G,T+1], V before each token and after the last
    """
    mean = stats.group_mean(rewards, valid)[..., None].expand(*rewards.shape, 1)
    values = torch.cat([mean, prefix_values[..., 1:]], -1)
    start, end = segment_values(rewards, values, segments, mask)
    return torch.where(mask, end - start, 0.0)


def segment_gain_in_tree(
    rewards: Tensor, token_ids: Tensor, segments: Tensor, mask: Tensor, valid: Tensor
) -> Tensor:
    """``segment_gain`` with the values of the group's own prefix tree: no further rollouts."""
    values = prefix_tree_values(rewards, token_ids, mask, valid)
    return segment_gain(rewards, values, segments, mask, valid)


def information_gain(
    rewards: Tensor,
    prefix_values: Tensor,
    segments: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    segment_discount: float,
    eps: float = 1e-5,
) -> Tensor:
    """Discounted sum from this segment on: each segment but the last brings what it adds to the
    prefix's value, the last the reward; both normalised in the group (IGPO, 2510.14967)."""
    start, end = segment_values(rewards, prefix_values, segments, mask)
    last = last_segment(segments, mask)
    seen = torch.ones_like(mask[..., 0]) if valid is None else valid
    starts = mask & ((segments != segments.roll(1, -1)) | first_token(mask))
    counted = starts & ~last & seen[..., None]
    gains = stats.standardize((end - start).flatten(1), counted.flatten(1), eps)
    outcome = stats.standardize(rewards, valid, eps)[..., None]
    gains = torch.where(last, outcome, gains.view(mask.shape))
    return torch.where(mask, _discounted(gains, starts, segments, segment_discount), 0.0)


def reward_to_go(rewards: Tensor, mask: Tensor, *, discount: float) -> Tensor:
    """Discounted sum of rewards [P,G,T] from each token on (REINFORCE++, 2501.03262)."""
    _check_per_token("reward_to_go", rewards, mask)
    running = torch.zeros_like(rewards[..., 0])
    columns = []
    for t in reversed(range(rewards.shape[-1])):
        running = torch.where(mask[..., t], rewards[..., t] + discount * running, running)
        columns.append(running)
    return torch.stack(columns[::-1], -1) * mask


def whiten_tokens(
    advantages: Tensor, mask: Tensor, valid: Tensor | None = None, *, eps: float = 0.0
) -> Tensor:
    """(A - mean) / std over all tokens of the batch [P,G,T]."""
    seen = mask if valid is None else mask & valid[..., None]
    return stats.whiten(advantages.expand_as(mask), seen, eps)


def center_by_position(advantages: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """A minus the mean, at this position, of the group's captions that reach it [P,G,T]."""
    _check_per_token("center_by_position", advantages, mask)
    seen = (mask if valid is None else mask & valid[..., None]).to(advantages.dtype)
    mean = (advantages * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
    return (advantages - mean) * seen


def normalize_tokens(
    rewards: Tensor, mask: Tensor, valid: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Rewards [P,G,T] of tokens, normalised over all tokens of the group (CAPO, 2508.02298)."""
    _check_per_token("normalize_tokens", rewards, mask)
    seen = mask if valid is None else mask & valid[..., None]
    return stats.standardize(rewards.flatten(1), seen.flatten(1), eps).view(mask.shape)


def token_baseline(
    rewards: Tensor,
    old_logprobs: Tensor,
    collision: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """r minus the variance-minimising baseline of each position: a mean of the group's rewards
    weighted by W_t, the sum up to t of 1 - 2 p + sum_v p_v^2 (OTB of verl); where that is 0 but for
    rounding, because all captions go through tokens that are all but certain, the plain mean."""
    seen = mask if valid is None else mask & valid[..., None]
    own = (1 - 2 * old_logprobs.exp() + collision).clamp(min=0)
    energy = torch.where(seen, own, 0.0).cumsum(-1) * seen
    # Rounding adds up along the caption.
    limit = _CERTAIN * (seen.cumsum(-1) * seen).sum(1, keepdim=True)
    certain = energy.sum(1, keepdim=True) <= limit
    weight = torch.where(certain, seen.to(energy.dtype), energy)
    total = weight.sum(1, keepdim=True)
    mean = (weight * rewards[..., None]).sum(1, keepdim=True)
    mean = mean / torch.where(total > 0, total, 1.0)
    return torch.where(seen, rewards[..., None] - mean, 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    truncated: Tensor,
    *,
    discount: float,
    gae_lambda: float,
    bootstrap_truncated: bool,
) -> Tensor:
    """Generalised advantage estimation with a critic's values [P,G,T] (1506.02438).

    rewards: [P,G], paid at the last token, or [P,G,T]
    bootstrap_truncated: a caption that was cut ends with the value of its last prefix instead of a
        reward (EGAE of T-PPO, 2506.15050)
    gae_lambda: 0 gives the one-step differences of POAD (2405.15821)
    """
    per_token = at_last_token(rewards, mask) if rewards.ndim == 2 else rewards
    cut = truncated if bootstrap_truncated else torch.zeros_like(truncated)
    last = last_token(mask)
    per_token = torch.where(last & cut[..., None], 0.0, per_token)
    tail = values.gather(-1, last.int().argmax(-1, keepdim=True))[..., 0] * cut
    running, following = torch.zeros_like(tail), tail
    columns = []
    for t in reversed(range(mask.shape[-1])):
        here = mask[..., t]
        delta = per_token[..., t] + discount * following - values[..., t]
        running = torch.where(here, delta + discount * gae_lambda * running, running)
        following = torch.where(here, values[..., t], following)
        columns.append(running)
    return torch.stack(columns[::-1], -1) * mask


def _check_per_token(name: str, values: Tensor, mask: Tensor) -> None:
    if values.shape != mask.shape:
        raise ValueError(
            f"{name} wants one number a token, {tuple(mask.shape)}, got {tuple(values.shape)}"
        )


def _discounted(gains: Tensor, first: Tensor, segments: Tensor, discount: float) -> Tensor:
    """For every token the sum of discount^k times the gains of its segment and those after."""
    running = torch.zeros_like(gains[..., 0])
    columns = []
    for t in reversed(range(gains.shape[-1])):
        here = first[..., t]
        running = torch.where(here, gains[..., t] + discount * running, running)
        columns.append(running)
    starts = torch.stack(columns[::-1], -1)
    same = segments[..., :, None] == segments[..., None, :]
    return starts.gather(-1, (same & first[..., None, :]).int().argmax(-1))
