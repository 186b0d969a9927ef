"""Losses [P,G,T] of tokens from ratio, bounds and advantage; all are minimised.

``advantages`` broadcasts to [P,G,T]; ``ratio`` is exp(log_ratio), finite also where log_ratio is
50; ``low`` and ``high`` bound it.  At policy = old every loss here that has a ratio has the
gradient of ``reinforce``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayrl.objectives.stats import by_sign, masked_mean, safe_exp, with_own_gradient


def reinforce(policy_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-A log p (Williams 1992): the policy gradient on fresh samples.  Advantage-weighted matching
    (2509.25050, read in its abstract) is this for tokens."""
    return -advantages * policy_logprobs


def nll(policy_logprobs: Tensor) -> Tensor:
    """-log p: cross-entropy on the captions that were kept (best-of-n, RAFT)."""
    return -policy_logprobs


def importance_weighted(policy_logprobs: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
    """-rho A log p with rho held constant: REINFORCE on older samples."""
    return -ratio.detach() * advantages * policy_logprobs


def unclipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    """-rho A: ESPO (2202.00079), whose only bound is to stop the inner epochs early."""
    return -ratio * advantages


def min_clip(
    ratio: Tensor,
    advantages: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    *,
    dual_clip: float = math.inf,
    ratio_cap: float = math.inf,
) -> Tensor:
    """-min(rho A, clip(rho, low, high) A) (PPO, 1707.06347).

    dual_clip: for A < 0 the loss is at most ``dual_clip * -A`` (1912.09729)
    ratio_cap: the unclipped ratio is at most this (INTELLECT-2, 2505.07291)
    """
    clipped = torch.clamp(ratio, _like(low, ratio), _like(high, ratio)) * advantages
    gain = torch.minimum(ratio.clamp(max=ratio_cap) * advantages, clipped)
    if dual_clip < math.inf:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def clipped_weight(
    policy_logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    """-sg(clip(rho, low, high)) A log p (CISPO, 2506.13585): every token keeps its gradient, only
    its weight is bounded."""
    weight = torch.clamp(ratio.detach(), _like(low, ratio), _like(high, ratio))
    return -weight * advantages * policy_logprobs


def geometric_mean(
    log_ratio: Tensor, advantages: Tensor, token_weights: Tensor, *, log_clip: float
) -> Tensor:
    """-A times the geometric mean of the ratios of the caption's tokens that train, each bounded in
    log space on the side where the advantage pushes it (GMPO, 2507.20673).  Each token has the
    value of the caption and the gradient of its own log-prob, which add up to the caption's."""
    sign = advantages.sign()
    bounded = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-log_clip, log_clip))
    bounded = bounded.expand_as(token_weights)
    mean = masked_mean(bounded, token_weights > 0)[..., None]
    return -advantages * safe_exp(with_own_gradient(mean, bounded))


def soft_gate(
    ratio: Tensor, advantages: Tensor, *, gate_positive: float, gate_negative: float
) -> Tensor:
    """-A (4/tau) sigmoid(tau (rho - 1)) (SAPO, 2511.20347): a smooth clip, tau by the sign of A."""
    tau = by_sign(advantages, gate_positive, gate_negative)
    return -advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1))


def linear_bound(
    ratio: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    """For A >= 0 the tangent -A (1 + log rho), which bounds -A rho from above; clipped for A < 0
    (BGPO, 2510.11683, read in its abstract, whose other half needs a likelihood that is only
    estimated)."""
    clipped = min_clip(ratio, advantages, low, high)
    return torch.where(advantages >= 0, -advantages * (1 + log_ratio), clipped)


def proximal(log_ratio: Tensor, advantages: Tensor, *, step_size: float) -> Tensor:
    """-A d + d^2 / (2 eta), d = log rho: the proximal surrogate in the space of log-probs (SSO,
    2302.02607)."""
    return -advantages * log_ratio + log_ratio.square() / (2 * step_size)


def squared_penalty(
    policy_logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, penalty: float
) -> Tensor:
    """-A log p + c (log rho)^2 (Kimi-style OPMD of 2509.24203)."""
    return -advantages * policy_logprobs + penalty * log_ratio.square()


def ratio_variance(ratio: Tensor, advantages: Tensor, *, penalty: float) -> Tensor:
    """-(rho A - lambda (rho - 1)^2) (R2VPO, 2601.03320)."""
    return -(ratio * advantages - penalty * (ratio - 1).square())


def opmd(policy_logprobs: Tensor, advantages: Tensor, *, opmd_temperature: float) -> Tensor:
    """-A log p / (1 + tau): online policy mirror descent (2509.24203)."""
    return -advantages * policy_logprobs / (1 + opmd_temperature)


def constrained_actor(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    auxiliary_logprobs: Tensor,
    advantages: Tensor,
    *,
    auxiliary_weight: float,
    actor_temperature: float,
) -> Tensor:
    """-sg(prod_k (pi_k / old)^(lambda / Lambda) exp(A / Lambda)) log p: stage two of the two-stage
    constrained actor-critic, which stays near one policy for each auxiliary reward."""
    power = auxiliary_weight / actor_temperature
    drift = power * (auxiliary_logprobs - old_logprobs[..., None]).sum(-1)
    weight = safe_exp((drift + advantages / actor_temperature).detach())
    return -weight * policy_logprobs


def _like(bound: Tensor | float, ratio: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device)
