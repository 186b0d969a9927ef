"""What the step did, as (sum, weight) pairs that add up over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives.inject import Values
from rayrl.objectives.stats import (
    masked_mean,
    masked_sum,
    pairwise,
    safe_exp,
    undiscounted_returns,
)
from rayrl.objectives.terms import self_cider

Metrics = dict[str, tuple[Tensor, Tensor | float]]


def of_loss(values: Values) -> Metrics:
    """All diagnostics of a micro-batch; none of them carries a gradient."""
    return {
        **_rewards(values),
        **_tokens(values),
        **_bounds(values),
        **_ranking(values),
        **_pairs(values),
        **_critic(values),
        **_scorer(values),
    }


def _rewards(values: Values) -> Metrics:
    """Share of flat groups (all rewards equal), of truncated and of kept captions; diversity and
    mixed reward versions where the batch has what they need."""
    rewards, valid = values["raw_rewards"], values["exists"]
    highest = rewards.masked_fill(~valid, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~valid, torch.inf).amin(1)
    captions = valid.sum()
    metrics: Metrics = {
        "objective/flat_groups": ((highest <= lowest).sum(), float(len(rewards))),
        "objective/truncated": ((values["truncated"] & valid).sum(), captions),
        "objective/kept": ((values["caption_weights"] > 0).sum(), captions),
    }
    if values.get("similarity") is not None:
        diversity = self_cider(values["similarity"])
        metrics["objective/self_cider"] = (diversity.sum(), float(len(diversity)))
    if values.get("reward_versions") is not None:
        versions = values["reward_versions"]
        mixed = (versions != versions[:, :1]).logical_and(valid).any(1)
        metrics["objective/mixed_reward_versions"] = (mixed.sum(), float(len(mixed)))
    return metrics


def _tokens(values: Values) -> Metrics:
    """Ratio statistics, KL estimates k1 and k3, entropy (of the old policy, as its samples tell it,
    and exactly where the objective needs it), and how far the engine's log-probs are
    from the learner's (mismatch; effective sample size of its weights, 1 where they agree)."""
    mask, count = values["mask"], values["mask"].sum()
    policy, old = values["policy_logprobs"].detach(), values["old_logprobs"]
    moved = torch.where(mask, policy - old, 0.0)
    ratio = safe_exp(moved)
    mismatch = torch.where(mask, old - values["rollout_logprobs"], 0.0)
    u = torch.where(mask, safe_exp(mismatch), 0.0)
    first, last = _halves(mask)
    metrics: Metrics = {
        "objective/ratio_mean": (masked_sum(ratio, mask).sum(), count),
        "objective/ratio_first_half": (masked_sum(ratio, first).sum(), first.sum()),
        "objective/ratio_second_half": (masked_sum(ratio, last).sum(), last.sum()),
        "objective/ratio_deviation": (masked_sum((ratio - 1).abs(), mask).sum(), count),
        "objective/step_kl_k1": (-moved.sum(), count),
        "objective/step_kl_k3": (masked_sum(ratio - 1 - moved, mask).sum(), count),
        "objective/mismatch_kl": (masked_sum(safe_exp(mismatch) - 1 - mismatch, mask).sum(), count),
        "objective/effective_sample_size": (_sample_size(u, mask).sum(), float(len(mask))),
    }
    sampled = mask if values.get("forced") is None else mask & ~values["forced"]
    metrics["objective/entropy_sampled"] = (-masked_sum(old, sampled).sum(), sampled.sum())
    if values.get("ref_logprobs") is not None:
        d = torch.where(mask, policy - values["ref_logprobs"], 0.0)
        metrics["objective/kl_k1"] = (d.sum(), count)
        metrics["objective/kl_k3"] = (masked_sum(safe_exp(-d) - 1 + d, mask).sum(), count)
    if values.get("entropy") is not None:
        metrics["objective/entropy"] = (masked_sum(values["entropy"].detach(), mask).sum(), count)
    return metrics


def _halves(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the first and of the second half of each caption."""
    position = mask.cumsum(-1)
    first = mask & (2 * position <= mask.sum(-1, keepdim=True) + 1)
    return first, mask & ~first


def _sample_size(u: Tensor, mask: Tensor) -> Tensor:
    """Effective share of each group's tokens [P]: (sum u)^2 / (n sum u^2)."""
    u, count = u.flatten(1).double(), mask.flatten(1).sum(1)
    return u.sum(1).square() / (count * u.square().sum(1)).clamp(min=1e-300)


def _bounds(values: Values) -> Metrics:
    """Where the ratio left its bounds in the direction that the advantage pushes it, a side each,
    and the positive over the negative mass of ratio times advantage (P/N of BAPO, 2510.18927)."""
    if "advantages" not in values:
        return {}
    mask, count = values["mask"], values["mask"].sum()
    advantages = values["advantages"].expand_as(mask)
    moved = values["policy_logprobs"].detach() - values["old_logprobs"]
    mass = torch.where(mask, safe_exp(moved) * advantages, 0.0)
    metrics: Metrics = {
        "objective/positive_negative_ratio": (mass.clamp(min=0).sum(), -mass.clamp(max=0).sum())
    }
    if "bounds" in values.known:
        ratio = values["ratio"].detach()
        low = mask & (ratio < values["low"]) & (advantages < 0)
        high = mask & (ratio > values["high"]) & (advantages > 0)
        metrics["objective/clip_low"] = (low.sum(), count)
        metrics["objective/clip_high"] = (high.sum(), count)
    return metrics


def _ranking(values: Values) -> Metrics:
    """Ranking accuracy (2405.19534): of all pairs with a better and a worse caption, the share
    where the better one has the higher mean log-prob, for the policy and for the reference."""
    rewards, valid, mask = values["raw_rewards"], values["exists"], values["mask"]
    better = (pairwise(rewards, rewards) > 0) & valid[:, :, None] & valid[:, None]
    metrics: Metrics = {}
    for name in ("policy", "ref"):
        if values.get(f"{name}_logprobs") is not None:
            score = masked_mean(values[f"{name}_logprobs"].detach(), mask)
            agree = better & (pairwise(score, score) > 0)
            metrics[f"objective/ranking_accuracy_{name}"] = (agree.sum(), better.sum())
    return metrics


def _pairs(values: Values) -> Metrics:
    """Log-ratios to the reference of the better and of the worse captions, apart: a preference
    loss that only pushes the worse ones down shows here (3D-properties of DPO, 2406.07327)."""
    if "pair_weights" not in values or values.get("ref_logprobs") is None:
        return {}
    drift = masked_sum(values["policy_logprobs"].detach() - values["ref_logprobs"], values["mask"])
    weights = values["pair_weights"]
    better, worse = weights.sum(2), weights.sum(1)
    return {
        "objective/better_over_ref": ((drift * better).sum(), better.sum()),
        "objective/worse_over_ref": ((drift * worse).sum(), worse.sum()),
    }


def _critic(values: Values) -> Metrics:
    """Explained variance of the critic at the start of the step, over tokens: 1 minus the sum of
    (R - V)^2 over that of (R - mean)^2, R the returns and the mean that of the whole step."""
    if values.get("values") is None:
        return {}
    mask = values["mask"]
    returns = undiscounted_returns(values["rewards"]).expand_as(mask)
    spread = masked_sum((returns - values["mean_return"][:, None, None]).square(), mask).sum()
    error = masked_sum((returns - values["values"]).square(), mask).sum()
    return {"objective/critic_explained_variance": (spread - error, spread)}


def _scorer(values: Values) -> Metrics:
    """Of all pairs that the true reward tells apart, the share that a learned scorer ranks
    alike."""
    rewards, scores, valid = values["raw_rewards"], values["rewards"], values["exists"]
    if values.get("caption_features") is None or scores.ndim != 2:
        return {}
    better = (pairwise(rewards, rewards) > 0) & valid[:, :, None] & valid[:, None]
    agree = better & (pairwise(scores, scores) > 0)
    return {"objective/scorer_accuracy": (agree.sum(), better.sum())}
