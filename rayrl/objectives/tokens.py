"""Where captions, segments and prefix trees begin and end: index arithmetic on tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives import stats


def at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards [P,G] on the last token of each caption, 0 elsewhere [P,G,T]."""
    return torch.where(last_token(mask), rewards[..., None], 0.0)


def last_token(mask: Tensor) -> Tensor:
    return mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))


def first_token(mask: Tensor) -> Tensor:
    return mask.cumsum(-1) == 1


def last_segment(segments: Tensor, mask: Tensor) -> Tensor:
    final = torch.where(last_token(mask), segments, 0).sum(-1, keepdim=True)
    return mask & (segments == final)


def segment_values(
    rewards: Tensor, prefix_values: Tensor, segments: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """V where the token's segment starts and where it ends [P,G,T]; the caption ends with r."""
    after = torch.where(last_token(mask), rewards[..., None], prefix_values[..., 1:])
    same = (segments[..., :, None] == segments[..., None, :]) & mask[..., None, :]
    first = same.int().argmax(-1)
    final = mask.shape[-1] - 1 - same.flip(-1).int().argmax(-1)
    return prefix_values[..., :-1].gather(-1, first), after.gather(-1, final)


def prefix_tree_values(rewards: Tensor, token_ids: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """[P,G,T+1]: the mean reward of the group's captions that share a caption's first t tokens.
    At t = 0 this is the group's mean; past a caption's end it stays that of the whole caption."""
    same = token_ids[:, :, None] == token_ids[:, None]
    same = same & mask[:, :, None] & mask[:, None] & valid[:, None, :, None]
    shared = same.cumprod(-1).bool()
    own = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    shared = torch.where(mask[:, :, None], shared, own[None, :, :, None])
    weight = shared.to(rewards.dtype)
    values = torch.einsum("pijt,pj->pit", weight, rewards) / weight.sum(2).clamp(min=1)
    start = stats.group_mean(rewards, valid).expand_as(rewards)
    return torch.cat([start[..., None], values], -1)
