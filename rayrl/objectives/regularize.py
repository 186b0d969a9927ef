"""Regularizers: losses added to the policy's; per token [P,G,T], reduced like the policy's."""

from __future__ import annotations

from torch import Tensor

from rayrl.objectives.stats import safe_exp


def kl_k3(policy_logprobs: Tensor, ref_logprobs: Tensor, *, kl_coef: float) -> Tensor:
    """coef * (exp(ref - p) - (ref - p) - 1): the estimator k3 of KL(policy || reference) (GRPO,
    2402.03300).  As a loss its gradient is that of the forward KL."""
    d = ref_logprobs - policy_logprobs
    return kl_coef * (safe_exp(d) - d - 1)
