"""Losses of whole captions [P,G] or groups [P], from scores, advantages, labels or pairs.

L is a caption's log-prob, S = L - L_old, D = L - L_ref, all sums over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayrl.objectives import stats
from rayrl.objectives.stats import masked_sum, pairwise, safe_exp
from rayrl.objectives.terms import NO_WEIGHTS, counted


def pair_mean(pair_losses: Tensor, pair_weights: Tensor) -> Tensor:
    """The weighted sum over a group's pairs [P]."""
    return torch.where(pair_weights != 0, pair_losses * pair_weights, 0.0).sum((1, 2))


def contrastive(scores: Tensor, pair_weights: Tensor, *, contrast_temperature: float) -> Tensor:
    """-(s_i - tau log mean_j exp(s_j / tau)) over the worse captions j of each better one i [P]
    (DisCO, 2505.12366): hard negatives count most; tau to infinity gives their mean."""
    share = pair_weights.sum(2)
    inner = pair_weights / torch.where(share > 0, share, 1.0)[..., None]
    scaled = scores / contrast_temperature
    log_weights = torch.where(inner > 0, inner, 1.0).log().masked_fill(inner <= 0, -torch.inf)
    # Rows without a worse caption have weight 0; a finite stand-in keeps their gradient finite.
    log_weights = torch.where((share > 0)[..., None], log_weights, 0.0)
    worse = contrast_temperature * (log_weights + scaled[:, None]).logsumexp(2)
    return -(share * (scores - worse)).sum(1)


def leave_one_out_bce(scores: Tensor, labels: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """Binary cross-entropy [P,G] of labels in [0,1] with psi_i = beta (s_i - mean of the others) as
    logit, the two classes of a group weighted alike (PACS, 2509.02522)."""
    centred = beta * (scores - stats.leave_one_out_mean(scores, valid))
    seen = valid.to(scores.dtype)
    count = seen.sum(1, keepdim=True).clamp(min=1)
    positive = (labels * seen).sum(1, keepdim=True)
    mixed = (positive > 0) & (positive < count)
    up = torch.where(mixed, count / (2 * positive.clamp(min=1e-6)), 1.0)
    down = torch.where(mixed, count / (2 * (count - positive).clamp(min=1e-6)), 1.0)
    return -up * labels * logsigmoid(centred) - down * (1 - labels) * logsigmoid(-centred)


def standardized_regression(
    scores: Tensor, caption_advantages: Tensor, valid: Tensor, *, spread_floor: float
) -> Tensor:
    """((s - mean) / sqrt(var + floor^2) - A)^2 [P,G] (Reg-GRPO, 2506.07464).  Without the floor
    the first gradient of a step, where all s are 0, is 0 / 0."""
    seen = valid.to(scores.dtype)
    deviation = (scores - stats.group_mean(scores, valid)) * seen
    count = seen.sum(1, keepdim=True).clamp(min=1)
    variance = deviation.square().sum(1, keepdim=True) / count
    predicted = deviation / (variance + spread_floor**2).sqrt()
    return (predicted - caption_advantages).square()


def regression(scores: Tensor, caption_advantages: Tensor, *, score_factor: float) -> Tensor:
    """(factor s - A)^2 [P,G] (Kimi k1.5, 2501.12599; A*-PO, 2505.20686)."""
    return (score_factor * scores - caption_advantages).square()


def reward_difference(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor,
    pair_weights: Tensor,
    *,
    beta: float,
    token_clip: float,
) -> Tensor:
    """Sum over pairs [P] of max(l, l_clip), l = ((D_i - D_j) - (r_i - r_j) / beta)^2, l_clip the
    same with every token's log(policy / old) within +-clip (PRDP, 2402.08714), times beta^2, which
    keeps the loss on the scale of the rewards."""
    moved, start = policy_logprobs - old_logprobs, old_logprobs - ref_logprobs
    wanted = pairwise(rewards, rewards)
    drifts = [
        masked_sum(start + change, mask) for change in (moved, moved.clamp(-token_clip, token_clip))
    ]
    plain, clipped = ((beta * pairwise(d, d) - wanted).square() for d in drifts)
    return (pair_weights * torch.maximum(plain, clipped)).sum((1, 2))


def posterior_matching(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor,
    valid: Tensor,
    *,
    posterior_temperature: float,
) -> Tensor:
    """KL(alpha || beta) [P], alpha = softmax(r / tau + L_ref - L_old) and beta = softmax(S) over
    the group (BRAIn, 2402.02479)."""
    target = rewards / posterior_temperature + masked_sum(ref_logprobs - old_logprobs, mask)
    moved = masked_sum(policy_logprobs - old_logprobs, mask)
    # Captions outside get probability 0 on both sides, through a finite logit.
    log_alpha, log_beta = (x.masked_fill(~valid, -1e30).log_softmax(1) for x in (target, moved))
    alpha = log_alpha.exp()
    return torch.where(alpha > 0, alpha * (log_alpha - log_beta), 0.0).sum(1)


def pairwise_policy_gradient(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor,
    pair_weights: Tensor,
    *,
    pair_clip: float,
) -> Tensor:
    """Sum over pairs [P] of -(r_i - r_j) / 2 sg(w_i w_j) M (L_i - L_j), w = exp(S); M drops pairs
    whose w_i / w_j is already beyond 1 +- clip in the direction of the update (P3O, 2310.00212)."""
    moved = masked_sum(policy_logprobs - old_logprobs, mask).detach()
    scores = masked_sum(policy_logprobs, mask)
    gap, drift = pairwise(rewards, rewards), pairwise(moved, moved)
    done = ((gap > 0) & (drift > math.log1p(pair_clip))) | (
        (gap < 0) & (drift < math.log1p(-pair_clip))
    )
    weight = safe_exp(moved[:, :, None] + moved[:, None]) * ~done
    losses = -gap / 2 * weight * pairwise(scores, scores)
    return torch.where(pair_weights != 0, pair_weights * losses, 0.0).sum((1, 2))


def changed_image(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    augmented_logprobs: Tensor,
    augmented_ref_logprobs: Tensor,
    mask: Tensor,
    pair_weights: Tensor,
    *,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta (D(x) - D(x~))) of the better captions [P], x~ the changed image: a caption
    must depend on its image (PaMi-VDPO, 2504.05810, read in its abstract)."""
    here = masked_sum(policy_logprobs - ref_logprobs, mask)
    there = masked_sum(augmented_logprobs - augmented_ref_logprobs, mask)
    return (pair_weights.sum(2) * -logsigmoid(beta * (here - there))).sum(1)


def heads(
    head_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    terms: Mapping[str, Tensor],
    valid: Tensor,
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
    *,
    beta: float,
) -> Tensor:
    """Mean over K output heads of the logistic loss of best against worst by the head's own reward
    term [P]; head_logprobs is [P,G,T,K] in the order of the terms whose weight is not 0, and by one
    of negative weight the lowest is best (MAH-DPO, 2510.01167, read in its abstract)."""
    theirs = counted(terms, reward_weights)
    own = [reward_weights.get(name, 1.0) * term for name, term in theirs.items()]
    if head_logprobs.shape[-1] != len(own):
        raise ValueError(f"{head_logprobs.shape[-1]} heads for {len(own)} reward terms")
    losses = []
    for head, reward in zip(head_logprobs.unbind(-1), own, strict=True):
        drift = masked_sum(head - ref_logprobs, mask)
        best = reward.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
        worst = reward.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
        gap = (drift.gather(1, best) - drift.gather(1, worst))[:, 0]
        losses.append(-logsigmoid(beta * gap) * (best != worst)[:, 0])
    return torch.stack(losses).mean(0)


def kimi(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    caption_advantages: Tensor,
    *,
    score_factor: float,
) -> Tensor:
    """-A L + factor / 2 S^2 [P,G]: the linear form of ``regression``."""
    moved = masked_sum(policy_logprobs - old_logprobs, mask)
    gain = caption_advantages * masked_sum(policy_logprobs, mask)
    return -gain + score_factor / 2 * moved.square()
