"""Losses [P,G,T] of tokens from ratio, bounds and advantage; all are minimised.

``advantages`` broadcasts to [P,G,T]; ``ratio`` is exp(log_ratio), finite also where log_ratio is
50; ``low`` and ``high`` bound it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reinforce(policy_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-A log p (Williams 1992): the policy gradient on fresh samples."""
    return -advantages * policy_logprobs


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


def _like(bound: Tensor | float, ratio: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device)
