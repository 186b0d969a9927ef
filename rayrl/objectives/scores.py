"""Scores [P,G] of captions under the policy, with gradient, for losses that compare captions.

L is the caption's log-prob, n its length, D = L - L_ref its log-ratio to the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayrl.objectives.stats import MAX_EXPONENT, masked_mean, masked_sum, safe_exp


def logprob(policy_logprobs: Tensor, mask: Tensor) -> Tensor:
    """L."""
    return masked_sum(policy_logprobs, mask)


def mean_logprob(policy_logprobs: Tensor, mask: Tensor) -> Tensor:
    """L / n (SimPO, 2405.14734)."""
    return masked_mean(policy_logprobs, mask)


def over_reference(policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """D (DPO, 2305.18290)."""
    return masked_sum(policy_logprobs - ref_logprobs, mask)


def mean_over_reference(policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """D / n (TRPA, 2504.04524)."""
    return masked_mean(policy_logprobs - ref_logprobs, mask)


def over_old(policy_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """L - L_old, the log-ratio of the whole caption."""
    return masked_sum(policy_logprobs - old_logprobs, mask)


def sampled_over_old(
    policy_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, forced: Tensor
) -> Tensor:
    """The same over the tokens that were sampled, without those that were given as a hint."""
    return masked_sum(policy_logprobs - old_logprobs, mask & ~forced)


def mean_ratio(ratio: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens of policy / old (the ratio form of DisCO, 2505.12366)."""
    return masked_mean(ratio, mask)


def chi_squared(policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """z + log z, z = exp(D) (chi-PO, 2407.13399): the linear part is a chi-squared penalty."""
    d = _drift(policy_logprobs, ref_logprobs, mask)
    return safe_exp(d) + d


def forward_kl(policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """-exp(-D) (f-DPO with the forward KL, 2309.16240)."""
    return -safe_exp(-_drift(policy_logprobs, ref_logprobs, mask))


def jensen_shannon(policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log sigmoid(D) + log 2 (f-DPO with the Jensen-Shannon divergence)."""
    return logsigmoid(_drift(policy_logprobs, ref_logprobs, mask)) + torch.log(torch.tensor(2.0))


def _drift(policy_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    drift = masked_sum(policy_logprobs - ref_logprobs, mask)
    return drift.clamp(-MAX_EXPONENT, MAX_EXPONENT)
