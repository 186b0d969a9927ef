"""Regularizers: losses added to the policy's, of tokens [P,G,T] (reduced like the policy's), of
captions [P,G], of groups [P], or one number.  A coefficient of 0 leaves the part out, and with it
what it needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rayrl.objectives.reduce import Normalizer
from rayrl.objectives.stats import (
    largest_covariance,
    masked_mean,
    masked_sum,
    safe_exp,
    undiscounted_returns,
)


def kl_k1(policy_logprobs: Tensor, ref_logprobs: Tensor, *, kl_coef: float) -> Tensor:
    """coef * d, d = log(policy / reference): unbiased as a value; on samples of the policy its
    gradient is 0 in expectation."""
    return kl_coef * (policy_logprobs - ref_logprobs)


def kl_k2(policy_logprobs: Tensor, ref_logprobs: Tensor, *, kl_coef: float) -> Tensor:
    """coef * d^2 / 2: the only one of k1, k2, k3 with the gradient of KL(policy || reference)."""
    return kl_coef * (policy_logprobs - ref_logprobs).square() / 2


def kl_k3(policy_logprobs: Tensor, ref_logprobs: Tensor, *, kl_coef: float) -> Tensor:
    """coef * (exp(-d) - 1 + d): the estimator k3 of KL(policy || reference), never negative (GRPO,
    2402.03300).  As a loss its gradient is that of KL(reference || policy)."""
    d = policy_logprobs - ref_logprobs
    return kl_coef * (safe_exp(-d) - 1 + d)


def kl_k3_straight(policy_logprobs: Tensor, ref_logprobs: Tensor, *, kl_coef: float) -> Tensor:
    """The value of k3 with the gradient of k2 (`k3+` of verl)."""
    k2 = kl_k2(policy_logprobs, ref_logprobs, kl_coef=kl_coef)
    k3 = kl_k3(policy_logprobs, ref_logprobs, kl_coef=kl_coef)
    return k2 + (k3 - k2).detach()


def kl_k3_weighted(
    policy_logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, *, kl_coef: float
) -> Tensor:
    """k3 times the ratio policy / old: unbiased on samples of the old policy (DeepSeek-V3.2)."""
    k3 = kl_k3(policy_logprobs, ref_logprobs, kl_coef=kl_coef)
    return safe_exp(policy_logprobs - old_logprobs) * k3


def kl_high_covariance(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    total: Callable[[Tensor], Tensor],
    *,
    covariance_share: float,
    covariance_kl_coef: float,
) -> Tensor:
    """coef * |log(policy / old)| on the few tokens with the largest covariance of advantage and
    log-prob (KL-Cov, 2505.22617)."""
    chosen = largest_covariance(policy_logprobs, advantages, mask, total, covariance_share)
    return covariance_kl_coef * (policy_logprobs - old_logprobs).abs() * chosen


def entropy_bonus(entropy: Tensor, *, entropy_coef: float) -> Tensor:
    """-coef * H of the next-token distribution."""
    return -entropy_coef * entropy


def nll_behaviour(policy_logprobs: Tensor, *, nll_coef: float) -> Tensor:
    """-coef * log p of all sampled captions: a pull towards what was sampled (forward KL,
    2509.24203)."""
    return -nll_coef * policy_logprobs


def nll_better(
    policy_logprobs: Tensor, mask: Tensor, pair_weights: Tensor, *, nll_coef: float
) -> Tensor:
    """-coef times the mean log-prob of the better captions of the pairs [P] (RPO, 2405.16436)."""
    mean = masked_mean(policy_logprobs, mask)
    return -nll_coef * (pair_weights.sum(2) * mean).sum(1)


def nll_references(anchor_logprobs: Tensor, anchor_mask: Tensor, *, nll_coef: float) -> Tensor:
    """-coef times the mean log-prob of the image's reference captions [P], which is stage 1's loss
    (PPO-ptx, 2203.02155)."""
    return -nll_coef * masked_mean(anchor_logprobs.flatten(1), anchor_mask.flatten(1))


def chi_squared(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    caption_weights: Tensor,
    normalizer: Normalizer,
    total: Callable[[Tensor], Tensor],
    *,
    chi_coef: float,
    chi_floor: float,
    chi_limit: float,
) -> Tensor:
    """coef * sqrt(max(mean(x + 1/x - 2), floor)), x = exp(D) of the whole caption: an estimate of
    the chi-squared divergence from the reference, never negative (2403.03185).  Beyond
    ``chi_limit`` exp is continued along its tangent."""
    d = masked_sum(policy_logprobs - ref_logprobs, mask)
    terms = safe_exp(d, chi_limit) + safe_exp(-d, chi_limit) - 2
    mine = (terms * caption_weights).sum() / max(normalizer.captions, 1e-12)
    whole = total(mine.detach())
    root = whole.clamp(min=chi_floor).sqrt()
    slope = torch.where(whole > chi_floor, 1 / (2 * root), 0.0)
    share = caption_weights.sum() / max(normalizer.captions, 1e-12)
    return chi_coef * (root * share + slope * (mine - mine.detach()))


def trust_region(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    token_weights: Tensor,
    caption_weights: Tensor,
    normalizer: Normalizer,
    total: Callable[[Tensor], Tensor],
    *,
    kl_limit: float,
    kl_penalty: float,
) -> Tensor:
    """sg(max(b (KL - limit), 0)) KL, KL = mean of old - policy over tokens: a penalty that is
    silent within the limit (DisCO, 2505.12366)."""
    weight = token_weights * caption_weights[..., None]
    drift = torch.where(weight > 0, (old_logprobs - policy_logprobs) * weight, 0.0)
    mine = drift.sum() / max(normalizer.tokens, 1e-12)
    excess = (kl_penalty * (total(mine.detach()) - kl_limit)).clamp(min=0)
    return excess * mine


def value_error(
    policy_values: Tensor,
    values: Tensor,
    rewards: Tensor,
    truncated: Tensor,
    *,
    value_coef: float,
    value_clip: float,
    finished_only: bool,
) -> Tensor:
    """coef / 2 * max((V - R)^2, (clip(V, old +- c) - R)^2): a critic's loss (PPO, 1707.06347), R
    the undiscounted rewards from the token on.

    rewards: [P,G], paid at the last token, or [P,G,T]
    finished_only: captions that were cut teach the critic nothing (T-PPO, 2506.15050)
    """
    returns = undiscounted_returns(rewards)
    near = values + (policy_values - values).clamp(-value_clip, value_clip)
    worst = torch.maximum((policy_values - returns).square(), (near - returns).square())
    counted = ~truncated[..., None] if finished_only else torch.ones_like(truncated)[..., None]
    return value_coef / 2 * worst * counted
