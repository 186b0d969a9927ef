"""Factors [P,G,T] for tokens about whose log-prob engine and learner disagree.

u = exp(old - rollout) is 1 where they agree, and then every factor here is 1.  Constants: no
gradient flows through them.
"""

from __future__ import annotations

from torch import Tensor

from rayrl.objectives.stats import safe_exp


def token_truncated(old_logprobs: Tensor, rollout_logprobs: Tensor, *, is_cap: float) -> Tensor:
    """min(u, cap): truncated importance sampling of every token; cap 2 in TRL and verl."""
    return safe_exp(old_logprobs - rollout_logprobs).clamp(max=is_cap)
