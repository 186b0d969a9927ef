"""Log-ratios of the policy to the policy at the start of the step, and bounds of the ratio.

A ratio part returns log_ratio [P,G,T] with gradient; a bounds part returns (low, high), numbers
or tensors that broadcast to it, without gradient.
"""

from __future__ import annotations

from torch import Tensor


def token(policy_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log(policy / old) of every token (GRPO, 2402.03300)."""
    return policy_logprobs - old_logprobs


def fixed(*, clip_low: float, clip_high: float) -> tuple[float, float]:
    """The ratio stays within [1 - clip_low, 1 + clip_high] (PPO, 1707.06347; two sides: DAPO)."""
    return 1 - clip_low, 1 + clip_high
