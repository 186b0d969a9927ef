"""Factors [P,G,T] for tokens about whose log-prob engine and learner disagree.

u = exp(old - rollout) is 1 where they agree, and then every factor here is 1.  Constants: no
gradient flows through them.  They correct for sampling from the engine's distribution, so they
assume that it is not cut by top-k or top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives.stats import masked_mean, masked_sum, safe_exp


def token_truncated(old_logprobs: Tensor, rollout_logprobs: Tensor, *, is_cap: float) -> Tensor:
    """min(u, cap): truncated importance sampling of every token; cap 2 in TRL and verl."""
    return safe_exp(old_logprobs - rollout_logprobs).clamp(max=is_cap)


def token_masked(
    old_logprobs: Tensor, rollout_logprobs: Tensor, *, is_low: float, is_high: float
) -> Tensor:
    """u within [low, high] and 0 outside: masked importance sampling (IcePop); 0.5 and 2 in TRL."""
    return _within(safe_exp(old_logprobs - rollout_logprobs), is_low, is_high)


def sequence_truncated(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, is_cap: float
) -> Tensor:
    """min(product of the caption's u, cap)."""
    return _product(old_logprobs, rollout_logprobs, mask).clamp(max=is_cap)


def sequence_masked(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    is_low: float,
    is_high: float,
) -> Tensor:
    """The product of the caption's u within [low, high] and 0 outside."""
    return _within(_product(old_logprobs, rollout_logprobs, mask), is_low, is_high)


def geometric_masked(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    is_low: float,
    is_high: float,
) -> Tensor:
    """1 for captions whose geometric mean of u lies within [low, high], 0 for the others; about
    [0.999, 1.001] in verl."""
    mean = safe_exp(masked_mean(old_logprobs - rollout_logprobs, mask))[..., None]
    return ((mean >= is_low) & (mean <= is_high)).to(old_logprobs.dtype)


def _product(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    return safe_exp(masked_sum(old_logprobs - rollout_logprobs, mask))[..., None]


def _within(u: Tensor, low: float, high: float) -> Tensor:
    return torch.where((u >= low) & (u <= high), u, 0.0)
