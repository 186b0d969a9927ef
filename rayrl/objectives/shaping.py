"""Reward shaping: rewards [P,G] to rewards [P,G]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayrl.objectives import scorer, stats, terms

State = Mapping[str, Any]


def overlong_penalty(
    rewards: Tensor, lengths: Tensor, *, overlong_coef: float, max_tokens: int, grace_tokens: int
) -> Tensor:
    """Minus coef times 0 up to ``max_tokens - grace_tokens``, rising linearly to 1 at
    ``max_tokens``, 1 beyond (the soft overlong punishment of DAPO, 2503.14476)."""
    over = (lengths - (max_tokens - grace_tokens)).clamp(min=0).to(rewards.dtype) / grace_tokens
    penalty = torch.where(lengths > max_tokens, 1.0, over)
    return rewards - overlong_coef * penalty


def kl_penalty(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    reward_kl_coef: float,
) -> Tensor:
    """r - coef * sum(old - ref): the estimate k1 of the whole caption's KL (RLOO, 2402.14740)."""
    return rewards - reward_kl_coef * stats.masked_sum(old_logprobs - ref_logprobs, mask)


def chi_squared_penalty(
    rewards: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    valid: Tensor,
    *,
    reward_chi_coef: float,
) -> Tensor:
    """r - coef * x / sqrt(chi^2), x = policy / reference of the whole caption: the exact gradient
    of the chi-squared regulariser (2403.03185), of which the loss form is an approximation."""
    d = stats.masked_sum(old_logprobs - ref_logprobs, mask)
    x = stats.safe_exp(d, 10.0)
    divergence = (x + stats.safe_exp(-d, 10.0) - 2) * valid
    chi_squared = (divergence.sum() / valid.sum().clamp(min=1)).clamp(min=1e-4)
    return rewards - reward_chi_coef * x / chi_squared.sqrt()


def kl_bounded(
    rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_max: float
) -> Tensor:
    """r max(1 - D / kl_max, 0), D the caption's log-ratio to the reference (CGPO, 2409.20370)."""
    drift = stats.masked_sum(old_logprobs - ref_logprobs, mask)
    return (1 - drift / kl_max).clamp(min=0) * rewards


def sigmoid_over_greedy(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """sigmoid(r - r(greedy)): calibrated by a baseline caption of the same image (CGPO)."""
    return torch.sigmoid(rewards - greedy_rewards[:, None])


def quantile_in_reference(rewards: Tensor, reference_rewards: Tensor) -> Tensor:
    """The share of the reference's captions with a lower reward, ties counting half (InfAlign,
    2412.19792); any increasing map of all rewards leaves it unchanged.  NaN where an image has
    fewer of them."""
    below = (reference_rewards[:, None] < rewards[..., None]).to(rewards.dtype)
    equal = (reference_rewards[:, None] == rewards[..., None]).to(rewards.dtype)
    count = reference_rewards.isfinite().sum(-1, keepdim=True)
    return (below + equal / 2).sum(-1) / count


def quantile_in_group(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """(rank - 1/2) / G, ties sharing their mean rank: ``quantile_in_reference`` without a
    reference."""
    seen = torch.ones_like(rewards) if valid is None else valid.to(rewards.dtype)
    gap = stats.pairwise(rewards, rewards)
    below = (gap > 0).to(rewards.dtype) + (gap == 0).to(rewards.dtype) / 2
    return (below * seen[:, None]).sum(2) / seen.sum(1, keepdim=True).clamp(min=1)


def exponential_tilt(rewards: Tensor, *, tilt: float) -> Tensor:
    """sign(t) exp(t r): what best-of-n (t > 0) or worst-of-n (t < 0) decoding wants (InfAlign)."""
    return math.copysign(1.0, tilt) * stats.safe_exp(tilt * rewards)


def win_rate(rewards: Tensor, valid: Tensor | None = None, *, tie_margin: float = 0.0) -> Tensor:
    """Share of the group's other captions that this one beats, ties counting half (Pref-GRPO,
    2508.20751, read in its abstract).  Rewards closer than or equal to ``tie_margin`` tie."""
    seen = torch.ones_like(rewards) if valid is None else valid.to(rewards.dtype)
    gap = stats.pairwise(rewards, rewards)
    wins = (gap > tie_margin).to(rewards.dtype)
    wins = wins + (gap.abs() <= tie_margin).to(rewards.dtype) / 2
    others = seen[:, None] * (1 - torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device))
    return (wins * others).sum(2) / others.sum(2).clamp(min=1)


def by_confidence(
    rewards: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    valid: Tensor,
    state: State,
    *,
    average_rate: float,
) -> tuple[Tensor, dict[str, Any]]:
    """r + sign(r >= mean) |r| (confidence - 1/2), against a running mean of the rewards (PPO-C,
    2410.09724).  A captioner says no confidence; exp of its mean log-prob stands in for it.

    state: `mean`, which starts as the first batch's
    """
    now = float(rewards[valid].mean())
    mean = state.get("mean", now)
    confidence = stats.masked_mean(old_logprobs, mask).exp()
    new = terms.calibrated(rewards, confidence, mean)
    return new, {"mean": (1 - average_rate) * mean + average_rate * now}


def history_normalized(
    rewards: Tensor, valid: Tensor, state: State, *, reward_clip: float
) -> tuple[Tensor, dict[str, Any]]:
    """clip((r - mean) / std, -c, c) with mean and std of all batches before this one (PPO-max,
    2307.04964); the first batch uses its own.

    state: `count`, `mean` and `variance` of the rewards so far
    """
    own = rewards[valid].double()
    count, mean = own.numel(), float(own.mean())
    variance = float(own.var(correction=0))
    before = state or {"count": 0, "mean": mean, "variance": variance}
    spread = math.sqrt(before["variance"]) or 1.0
    normal = ((rewards - before["mean"]) / spread).clamp(-reward_clip, reward_clip)
    total = before["count"] + count
    shift = mean - before["mean"]
    new_mean = before["mean"] + shift * count / total
    sums = before["variance"] * before["count"] + variance * count
    sums += shift**2 * before["count"] * count / total
    return normal, {"count": total, "mean": new_mean, "variance": sums / total}


def self_trained_scorer(
    rewards: Tensor,
    caption_features: Tensor,
    valid: Tensor,
    state: State,
    *,
    scorer_passes: int,
    scorer_memory: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Scores [P,G] in place of the true ``rewards`` [P,G], all of a batch by one version of the
    scorer.  At first it is trained on the best and the worst caption of each group; then after
    each step on its mistakes too, the truly best caption against the one that it took for the best
    (RewardRanker, read in its abstract).

    scorer_passes: gradient steps of a training, which starts anew each time
    scorer_memory: how many pairs the training set holds, the newest
    state: `pairs` [M,D], the training set; see :mod:`rayrl.objectives.scorer`
    """
    features = caption_features.to(rewards.dtype)
    best = rewards.masked_fill(~valid, -torch.inf).argmax(1)
    pairs = torch.tensor(state.get("pairs", ()), dtype=rewards.dtype, device=rewards.device)
    if not len(pairs):
        worst = rewards.masked_fill(~valid, torch.inf).argmin(1)
        pairs = scorer.differences(features, rewards, best, worst)
    scores = torch.where(valid, features @ scorer.pairwise_logistic(pairs, scorer_passes), 0.0)
    mistaken = scorer.hard_negatives(scores, rewards, valid)
    chosen = scores.masked_fill(~valid, -torch.inf).argmax(1)
    new = scorer.differences(
        features[mistaken], rewards[mistaken], best[mistaken], chosen[mistaken]
    )
    kept = torch.cat([pairs, new])[-scorer_memory:]
    return scores, {"pairs": kept.float().cpu().numpy()}


def brevity(
    rewards: Tensor, lengths: Tensor, labels: Tensor, valid: Tensor, *, efficiency_scale: float
) -> Tensor:
    """r times an efficiency that is 1 for captions as long as the shortest good one of the group
    and falls off on both sides (OTC-PO, 2504.14870, with tokens in place of tool calls).  Groups
    without a good caption stay as they are."""
    good = (labels > 0.5) & valid
    n = lengths.to(rewards.dtype)
    best = n.masked_fill(~good, torch.inf).amin(1, keepdim=True)
    scaled = (
        efficiency_scale * terms.efficiency(n, torch.where(best < torch.inf, best, 1.0)) * rewards
    )
    return torch.where(best < torch.inf, scaled, rewards)


def shorten_good_groups(
    rewards: Tensor,
    lengths: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    length_weight: float,
    good_share: float,
) -> Tensor:
    """In the ``good_share`` of the groups with the most good captions: good captions keep
    1 - alpha sigmoid(z) of their reward, z the length normalised over the good captions
    (GRPO-lambda, 2505.18086); elsewhere the length does not count yet."""
    good = (labels > 0.5) & valid
    quality = (labels * valid).sum(1) / valid.sum(1).clamp(min=1)
    chosen = math.ceil(good_share * len(quality))
    if not chosen:
        return rewards
    threshold = quality.sort(descending=True).values[chosen - 1]
    apply = good & ((quality >= threshold) & (quality > 0))[:, None]
    factor = 1 - length_weight * torch.sigmoid(stats.standardize(lengths.to(rewards.dtype), good))
    return torch.where(apply, rewards * factor, rewards)


def diversity_bonus(
    rewards: Tensor, similarity: Tensor, valid: Tensor | None = None, *, diversity_coef: float
) -> Tensor:
    """r plus coef times what the caption adds to the group's diversity: its Self-CIDEr minus that
    without the caption, because a bonus that is equal in a group has no effect."""
    seen = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    bonus = torch.zeros_like(rewards)
    for row, members in enumerate(seen):
        kept = members.nonzero()[:, 0].tolist()
        groups = [kept, *([j for j in kept if j != i] for i in kept)]
        whole, *without = (
            terms.self_cider(similarity[row][some][:, some]).to(bonus)
            if some
            else bonus.new_zeros(())
            for some in groups
        )
        for i, score in zip(kept, without, strict=True):
            bonus[row, i] = whole - score
    return rewards + diversity_coef * bonus
