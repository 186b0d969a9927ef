"""Rewards of single tokens: rewards [P,G] to rewards [P,G,T], for advantages that take them."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives.tokens import at_last_token


def terminal(rewards: Tensor, mask: Tensor) -> Tensor:
    """The caption's reward on its last token, 0 on the others."""
    return at_last_token(rewards, mask)


def token_kl_penalty(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    reward_kl_coef: float,
) -> Tensor:
    """Rewards [P,G,T] minus coef * (old - ref) of each token (PPO for language models)."""
    return rewards - reward_kl_coef * torch.where(mask, old_logprobs - ref_logprobs, 0.0)


def guided(
    rewards: Tensor,
    guide_logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    guide_weight: float,
    guide_cap: float,
    guide_kl: float,
    outcome_weight: float,
    outcome_cap: float,
) -> Tensor:
    """b1 (guide - ref), within +-cap, minus b2 (old - ref), and b3 r within +-cap at the end (RTO,
    2404.18922): a preference-tuned copy of the model rewards single tokens."""
    guide = (guide_weight * (guide_logprobs - ref_logprobs)).clamp(-guide_cap, guide_cap)
    dense = torch.where(mask, guide - guide_kl * (old_logprobs - ref_logprobs), 0.0)
    outcome = outcome_weight * rewards.clamp(-outcome_cap, outcome_cap)
    return dense + at_last_token(outcome, mask)


def wrong_spans(
    rewards: Tensor,
    token_credit: Tensor,
    mask: Tensor,
    *,
    outcome_weight: float,
    span_penalty: float,
) -> Tensor:
    """C r on every token, minus P on tokens of phrases that a judge marked wrong (CAPO, 2508.02298,
    with the caption's reward in place of its 0 or 1).

    token_credit: [P,G,T], 1 on tokens of a wrong phrase
    """
    marked = outcome_weight * rewards[..., None] - span_penalty * token_credit
    return torch.where(mask, marked, 0.0)
