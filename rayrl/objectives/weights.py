"""Factors [P,G,T] on the losses of tokens, without gradient.  They do not enter denominators: a
token with factor 0 still counts in a mean over tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rayrl.objectives.stats import by_sign, largest_covariance, masked_mean, masked_sum, safe_exp


def one_side(
    ratio: Tensor, advantages: Tensor, low: Tensor | float, high: Tensor | float
) -> Tensor:
    """0 where the ratio has left its bounds in the direction of the advantage (REC, 2509.24203).
    With the loss ``importance_weighted`` this has the gradient of the PPO clip."""
    inside = torch.where(advantages >= 0, ratio <= high, ratio >= low)
    return inside.to(ratio.dtype)


def two_side(ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """0 where the ratio has left its bounds (REC two-side, 2509.24203)."""
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)


def ring(
    ratio: Tensor,
    advantages: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    *,
    ring_low: float,
    ring_high: float,
) -> Tensor:
    """1 within the bounds, and far outside of them where the advantage pulls back (REC ring):
    A >= 0 with ratio <= 1 - ring_low, or A <= 0 with ratio >= 1 + ring_high."""
    inside = (ratio >= low) & (ratio <= high)
    back = ((advantages >= 0) & (ratio <= 1 - ring_low)) | (
        (advantages <= 0) & (ratio >= 1 + ring_high)
    )
    return (inside | back).to(ratio.dtype)


def tapered(log_ratio: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """min(w, 1) for A < 0 and 1 otherwise, w the ratio of the whole caption (TOPR, 2503.14286)."""
    w = safe_exp(masked_sum(log_ratio, mask)[..., None]).detach()
    return torch.where(advantages < 0, w.clamp(max=1), 1.0)


def soft_sequence(
    log_ratio: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    power_positive: float,
    decay_positive: float,
    power_negative: float,
    decay_negative: float,
) -> Tensor:
    """w^k exp(lambda (1 - w)), w the ratio of the whole caption (VESPO, 2602.10693); 1 at w = 1."""
    log_w = masked_sum(log_ratio, mask)[..., None].detach()
    power = by_sign(advantages, power_positive, power_negative)
    decay = by_sign(advantages, decay_positive, decay_negative)
    return safe_exp(power * log_w + decay * (1 - safe_exp(log_w)))


def length(token_weights: Tensor, policy_logprobs: Tensor) -> Tensor:
    """The caption's length in tokens that train (LUSPO, 2602.05261)."""
    return (token_weights > 0).sum(-1, keepdim=True).to(policy_logprobs.dtype)


def not_stale_negative(
    policy_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    stale_kl: float,
) -> Tensor:
    """0 for captions with A < 0 whose mean log-prob has fallen by more than ``stale_kl`` since they
    were sampled, in earlier updates of the step or of steps before (the off-policy sequence mask of
    DeepSeek-V3.2)."""
    fallen = masked_mean(rollout_logprobs - policy_logprobs.detach(), mask)[..., None]
    return 1 - ((advantages < 0) & (fallen > stale_kl)).to(policy_logprobs.dtype)


def high_entropy(entropy: Tensor, mask: Tensor, *, entropy_share: float) -> Tensor:
    """Trains only the ``entropy_share`` of a group's tokens with the highest entropy (2506.01939),
    scaled up to a mean of 1 because the others stay in the denominator.  The quantile is the
    group's, so that the result does not depend on how a minibatch is cut.  Tokens of the same
    entropy as the last one that is chosen train too: captions begin after the same prompt."""
    seen = entropy.detach().masked_fill(~mask, -torch.inf).flatten(1)
    tokens = mask.flatten(1).sum(1)
    count = (tokens * entropy_share).ceil().long().clamp(min=1)
    ordered = seen.sort(dim=1, descending=True).values
    threshold = ordered.gather(1, (count - 1)[:, None])[..., None]
    chosen = (entropy.detach() >= threshold) & mask
    scale = tokens / chosen.flatten(1).sum(1).clamp(min=1)
    return chosen * scale[:, None, None].to(entropy.dtype)


def forced_high_entropy(
    forced: Tensor, entropy: Tensor, mask: Tensor, *, forced_share: float
) -> Tensor:
    """Of the tokens of a caption that were given and not sampled, only the ``forced_share`` with
    the highest entropy train (the entropy filter of IGPO, 2509.10396); sampled ones all do."""
    given = forced & mask
    seen = entropy.detach().masked_fill(~given, -torch.inf)
    count = (given.sum(-1) * forced_share).ceil().long().clamp(min=1)
    threshold = seen.sort(dim=-1, descending=True).values.gather(-1, (count - 1)[..., None])
    return (~given | (seen >= threshold)).to(entropy.dtype)


def without_covariance(
    policy_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    total: Callable[[Tensor], Tensor],
    *,
    covariance_share: float,
) -> Tensor:
    """0 for the few tokens of the minibatch with the largest (A - mean)(log p - mean), which drive
    the entropy down (Clip-Cov, 2505.22617)."""
    chosen = largest_covariance(policy_logprobs, advantages, mask, total, covariance_share)
    return 1 - chosen.to(policy_logprobs.dtype)
