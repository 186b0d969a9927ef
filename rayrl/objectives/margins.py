"""Margins h [P,G,G] of pairs from scores: how much more the policy likes i than j."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayrl.objectives.plan import near
from rayrl.objectives.stats import masked_sum, pairwise
from rayrl.objectives.terms import NO_WEIGHTS


def difference(scores: Tensor, *, beta: float) -> Tensor:
    """beta (s_i - s_j) (DPO, 2305.18290)."""
    return beta * pairwise(scores, scores)


def target_margin(scores: Tensor, *, beta: float, target: float) -> Tensor:
    """beta (s_i - s_j) - target (SimPO, 2405.14734)."""
    return beta * pairwise(scores, scores) - target


def clipped_difference(scores: Tensor, *, beta: float, margin_cap: float) -> Tensor:
    """beta (s_i - s_j) within +-cap (chi-PO, 2407.13399; cap is twice the rewards' range)."""
    return (beta * pairwise(scores, scores)).clamp(-margin_cap, margin_cap)


def two_betas(scores: Tensor, *, beta_better: float, beta_worse: float) -> Tensor:
    """b+ s_i - b- s_j: with b- < b+ the worse caption is pushed down less (3D-properties of DPO,
    2406.07327)."""
    return pairwise(beta_better * scores, beta_worse * scores)


def favour_top(
    scores: Tensor, labels: Tensor, valid: Tensor, *, beta: float, top_factor: float
) -> Tensor:
    """beta (s_i - s_j), times ``top_factor`` where i is of the best level of the group's captions
    that are left (TRPA, 2504.04524)."""
    top = labels >= labels.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    margins = beta * pairwise(scores, scores)
    return torch.where(top[:, :, None], top_factor * margins, margins)


def other_terms(
    scores: Tensor,
    terms: Mapping[str, Tensor],
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
    *,
    beta: float,
    main_term: str,
    main_weight: float,
) -> Tensor:
    """(beta (s_i - s_j) - sum_k w_k (r_k,i - r_k,j)) / w_main over the other terms k, which share
    1 - w_main by their weights under reward.terms (MODPO, 2310.03708): one of weight 0 has no part
    in it, and a penalty of negative weight stays one."""
    if main_term not in terms:
        raise ValueError(f"main_term: no reward term {main_term!r}{near(main_term, terms)}")
    weights = {name: reward_weights.get(name, 1.0) for name in terms if name != main_term}
    total = sum(abs(weight) for weight in weights.values())
    gap: Tensor | float = 0.0
    if total:
        shares = [weight / total * terms[name] for name, weight in weights.items()]
        others = torch.stack(shares).sum(0)
        gap = (1 - main_weight) * pairwise(others, others)
    return (beta * pairwise(scores, scores) - gap) / main_weight


def guided_tokens(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    guide_logprobs: Tensor,
    mask: Tensor,
    *,
    beta: float,
    guidance: float,
) -> Tensor:
    """beta times a difference of sums of token log-ratios, weighted by 1 + a g in i and 1 - a g in
    j, at least 0, g = beta (guide - ref) (TGDPO, 2506.14574)."""
    drift = policy_logprobs - ref_logprobs
    credit = guidance * beta * (guide_logprobs - ref_logprobs)
    better, worse = (masked_sum((1 + sign * credit).clamp(min=0) * drift, mask) for sign in (1, -1))
    return beta * pairwise(better, worse)


def signed_by_reward(scores: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    """beta (s_i - sign(r_i - r_j) s_j): an earlier checkpoint's caption j that is better than i is
    pulled up, not pushed down (SePPO, 2410.05255, read in its abstract)."""
    sign = torch.where(pairwise(rewards, rewards) >= 0, 1.0, -1.0)
    return beta * (scores[:, :, None] - sign * scores[:, None])
