"""Log-ratios of the policy to the policy at the start of the step: log_ratio [P,G,T], with
gradient.  What is clipped or weighted later is exp(log_ratio)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rayrl.objectives.stats import masked_mean, with_own_gradient


def token(policy_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log(policy / old) of every token (GRPO, 2402.03300)."""
    return policy_logprobs - old_logprobs


def over_rollout(policy_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """log(policy / engine) of every token, the engine having sampled perhaps in another context,
    such as with a hint that the policy does not get (Guide, 2506.13923,
    read in its abstract)."""
    return policy_logprobs - rollout_logprobs


def sequence(policy_logprobs: Tensor, old_logprobs: Tensor, token_weights: Tensor) -> Tensor:
    """The mean over the caption's tokens that train, on each of its tokens: the geometric mean of
    the token ratios (GSPO, 2507.18071).  The gradient is that of the token's own log-prob (GSPO's
    token form), so that what weighs or leaves out a token acts on that token."""
    mean = masked_mean((policy_logprobs - old_logprobs).detach(), token_weights > 0)
    return with_own_gradient(mean[..., None], policy_logprobs)


def segment(
    policy_logprobs: Tensor, old_logprobs: Tensor, token_weights: Tensor, segments: Tensor
) -> Tensor:
    """The mean over the token's segment (the chunks of Chunk-GRPO, read in its abstract; the paper
    has flow models, the geometric mean for tokens is the reading here), with the gradient of
    ``sequence``.  Segments of one token give ``token``, one of a caption gives ``sequence``."""
    seen = token_weights > 0
    moved = torch.where(seen, (policy_logprobs - old_logprobs).detach(), 0.0)
    ids = torch.where(seen, segments, 0)
    size = int(ids.max()) + 1
    zeros = moved.new_zeros(*moved.shape[:2], size)
    total = zeros.scatter_add(-1, ids, moved)
    count = zeros.scatter_add(-1, ids, seen.to(moved.dtype)).clamp(min=1)
    return with_own_gradient((total / count).gather(-1, ids), policy_logprobs)


def recentered(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """Deviation from the minibatch's mean at this position, scaled so that all positions have the
    same spread: (d - mean_t) / std_t * mean(std) (the RatioNorm of GRPO-Guard, 2510.22319, which
    has flow steps in place of positions).  Positions at which captions do not differ, such as those
    that none reaches, are in no mean.  Mean and spread carry no gradient."""
    moved = torch.where(mask, policy_logprobs - old_logprobs, 0.0)
    seen = mask.to(moved.dtype)
    with torch.no_grad():
        count = total(seen.sum((0, 1))).clamp(min=1)
        mean = total(moved.sum((0, 1))) / count
        spread = (total(((moved - mean).square() * seen).sum((0, 1))) / count).sqrt()
        differs = spread > 0
        usual = masked_mean(spread, differs)
        scale = torch.where(differs, usual / torch.where(differs, spread, 1.0), 1.0)
    return (moved - mean) * scale
