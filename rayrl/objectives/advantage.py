"""Advantage estimators: from the rewards of a group to advantages [P,G] (or [N,P,G,1]).

``rewards`` is [P,G] unless said.  ``valid`` [P,G] hides captions that do not exist, or that were
dropped where the plan takes its statistics over the kept ones.  A part that reads ``advantages``
changes those of the part before it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rayrl.objectives import stats
from rayrl.objectives.plan import near
from rayrl.objectives.terms import NO_WEIGHTS


def raw_reward(rewards: Tensor) -> Tensor:
    """r itself: no baseline."""
    return rewards


def group_normalize(
    rewards: Tensor, valid: Tensor | None = None, *, eps: float = 1e-5, ddof: int = 0
) -> Tensor:
    """(r - mean) / (std + eps) over the group (GRPO, 2402.03300); flat groups give exactly 0.

    Sources differ in ``ddof`` and ``eps``: the captioning paper 0 and 1e-5, TRL 1 and 1e-4."""
    return stats.standardize(rewards, valid, eps, ddof)


def group_center(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """r - mean over the group (Dr.GRPO, 2503.20783)."""
    return stats.center(rewards, valid)


def greedy_baseline(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """r - r(greedy caption) (SCST, 1612.00563; ReMax, 2310.10505)."""
    return rewards - greedy_rewards[:, None]


def leave_one_out(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """r minus the mean of the other captions' rewards (NSC, 2003.09971; RLOO, 2402.14740),
    which is G/(G-1) times the deviation from the group's mean."""
    deviation = stats.center(rewards, valid)
    return deviation - stats.leave_one_out_mean(deviation, valid)


def shifted_baseline(
    rewards: Tensor, valid: Tensor | None = None, *, baseline_shift: float
) -> Tensor:
    """r - (mean + shift): below the mean, good captions weigh more than bad ones (AsymRE,
    2509.24203); in units of the reward."""
    return rewards - (stats.group_mean(rewards, valid) + baseline_shift)


def log_mean_exp_baseline(
    rewards: Tensor, valid: Tensor | None = None, *, baseline_temperature: float
) -> Tensor:
    """r - tau log mean exp(r / tau) over the group (OPMD, 2509.24203)."""
    return rewards - baseline_temperature * _log_mean_exp(rewards / baseline_temperature, valid)


def reference_value_baseline(
    rewards: Tensor, reference_rewards: Tensor, *, value_temperature: float
) -> Tensor:
    """r - V*, V* = tau log mean exp(r_ref / tau) over reference captions (A*-PO, 2505.20686);
    NaN where an image has fewer of them."""
    scaled = reference_rewards / value_temperature
    return rewards - value_temperature * _log_mean_exp(scaled, reference_rewards.isfinite())


def length_weighted_baseline(
    rewards: Tensor, lengths: Tensor, valid: Tensor | None = None
) -> Tensor:
    """r - sum(n r) / sum(n) over the group, n the length in tokens (OPO, 2505.23585)."""
    n = lengths.to(rewards.dtype)
    mean = stats.group_mean(n * rewards, valid) / stats.group_mean(n, valid).clamp(min=1e-6)
    return rewards - mean


def relative_to_mean(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """(r - mean) / mean (MaxRL, 2602.02710); 0 where the mean is not positive."""
    mean = stats.group_mean(rewards, valid)
    return torch.where(
        mean > 0, stats.center(rewards, valid) / torch.where(mean > 0, mean, 1.0), 0.0
    )


def nonzero_scaled(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """a (r - mean), a = captions over captions with a reward other than 0 (GPG, 2504.02546)."""
    seen = torch.ones_like(rewards) if valid is None else valid.to(rewards.dtype)
    nonzero = ((rewards != 0) * seen).sum().clamp(min=1)
    return stats.center(rewards, valid) * seen.sum() / nonzero


def best_over_second(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """The best caption gets its lead over the second, all others 0 (pass@k, 2503.19595)."""
    seen = rewards if valid is None else rewards.masked_fill(~valid, -torch.inf)
    two = seen.topk(2, dim=1)
    lead = torch.nan_to_num(two.values[:, :1] - two.values[:, 1:], posinf=0.0)
    return torch.zeros_like(rewards).scatter(1, two.indices[:, :1], lead)


def virtual_best(
    rewards: Tensor,
    valid: Tensor | None = None,
    *,
    best_reward: float,
    virtual_copies: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Normalised as if the group held ``virtual_copies`` more captions of reward ``best_reward``
    (NGRPO, 2509.18851; ddof 1), so that a group of equally bad captions is pushed down.  A group
    that surpasses ``best_reward`` uses its own best."""
    seen = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    own = rewards.masked_fill(~seen, -torch.inf).amax(1, keepdim=True)
    extra = own.clamp(min=best_reward).expand(-1, virtual_copies)
    both = torch.cat([rewards, extra], 1)
    there = torch.cat([seen, torch.ones_like(extra, dtype=torch.bool)], 1)
    return stats.standardize(both, there, eps, ddof=1)[:, : rewards.shape[1]]


def anchored(
    rewards: Tensor,
    valid: Tensor | None = None,
    *,
    anchor_weight: float,
    anchor_reward: float,
    eps: float = 1e-5,
) -> Tensor:
    """Normalised plus weight * (r - anchor): a signal in flat groups too (the group half of VGPO,
    whose abstract gives no formula)."""
    return stats.standardize(rewards, valid, eps) + anchor_weight * (rewards - anchor_reward)


def softmax_weight(
    rewards: Tensor, valid: Tensor | None = None, *, weight_temperature: float
) -> Tensor:
    """G softmax(r / tau) over the group: reward-weighted regression, which only pulls up."""
    seen = rewards if valid is None else rewards.masked_fill(~valid, -torch.inf)
    count = torch.isfinite(seen).sum(1, keepdim=True)
    return count * torch.softmax(seen / weight_temperature, 1)


def normalize_each(
    terms: Mapping[str, Tensor],
    valid: Tensor | None = None,
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
    *,
    term_weights: Mapping[str, float],
    eps: float = 1e-4,
    ddof: int = 1,
) -> Tensor:
    """Each reward term normalised in its group, then their weighted sum (GDPO, 2601.05242), each by
    its weight in ``term_weights`` or else under reward.terms: the scale of a term does not
    matter."""
    for name in term_weights:
        if name not in terms:
            raise ValueError(f"term_weights: no reward term {name!r}{near(name, terms)}")
    weights = {**reward_weights, **term_weights}
    normal = {name: stats.standardize(term, valid, eps, ddof) for name, term in terms.items()}
    return torch.stack([weights.get(name, 1.0) * z for name, z in normal.items()]).sum(0)


def local_and_global(
    rewards: Tensor,
    valid: Tensor | None = None,
    *,
    outcome_width: float,
    blend_slope: float,
    blend_entropy: float,
    eps: float = 1e-5,
) -> Tensor:
    """Two advantages [2,P,G,1], of a caption in its group and of the group in the batch, blended by
    the entropy of the group's outcomes (COPO, 2508.04138); needs two groups and two captions.

    A caption's outcome is its reward rounded down to multiples of ``outcome_width``.  The weight of
    the local one is sigmoid(slope * (H - blend_entropy)), H in bits, and 0 in flat groups.

    Raises ValueError for groups of one caption.
    """
    if rewards.shape[1] < 2:
        raise ValueError("local_and_global: a group of 1 caption, want at least 2")
    seen = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    # A group of which one caption is left has no entropy, whatever its scale.
    size = seen.sum(1, keepdim=True).clamp(min=2).to(rewards.dtype)
    entropy = _outcome_entropy(torch.floor(rewards / outcome_width), seen)
    local = stats.standardize(rewards, valid, eps, ddof=1)
    scale = (1 - 1 / size) / torch.log2(size)
    group = stats.group_mean(rewards, valid) * (1 - scale * entropy)
    world = stats.standardize(group.T, eps=eps, ddof=1).T
    weight = torch.sigmoid(blend_slope * (entropy - blend_entropy)) * (local != 0).any(1, True)
    return torch.stack([weight * local, (1 - weight) * world.expand_as(local)])[..., None]


def whiten_batch(
    advantages: Tensor, lengths: Tensor, valid: Tensor | None = None, *, eps: float = 0.0
) -> Tensor:
    """(A - mean) / std over the batch, a caption counting once a token (REINFORCE++-baseline,
    2501.03262)."""
    weight = lengths.to(advantages.dtype) * (1.0 if valid is None else valid)
    return stats.whiten(advantages, weight, eps)


def whiten_captions(
    advantages: Tensor, valid: Tensor | None = None, *, batch_eps: float = 1e-4
) -> Tensor:
    """(A - mean) / (std + eps) over the captions of the batch (GDPO's second step)."""
    return stats.whiten(advantages, valid, batch_eps)


def center_batch(rewards: Tensor, valid: Tensor | None = None) -> Tensor:
    """r minus the mean of the whole batch (CGPO, 2409.20370)."""
    weight = torch.ones_like(rewards) if valid is None else valid.to(rewards.dtype)
    mean = (rewards * weight).sum() / weight.sum().clamp(min=1)
    return (rewards - mean) * weight


def over_batch_std(
    advantages: Tensor, rewards: Tensor, valid: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """A over the rewards' standard deviation in the batch (Lite-PPO, 2508.08221)."""
    weight = torch.ones_like(rewards) if valid is None else valid.to(rewards.dtype)
    count = weight.sum().clamp(min=1)
    mean = (rewards * weight).sum() / count
    return advantages / ((((rewards - mean).square() * weight).sum() / count).sqrt() + eps)


def favour_novel(
    advantages: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    novelty: float,
    novelty_cap: float,
) -> Tensor:
    """For A > 0: A + min(max(novelty (1 - eta), 0), cap A), eta the caption's mean likelihood over
    the group's geometric mean of it (XRPO, 2510.06672): unlikely good captions gain."""
    mean_logprob = stats.masked_mean(old_logprobs, mask)
    eta = (mean_logprob - stats.group_mean(mean_logprob, valid)).exp()
    bonus = torch.minimum((novelty * (1 - eta)).clamp(min=0), novelty_cap * advantages)
    return advantages + torch.where(advantages > 0, bonus, 0.0)


def exponential_weight(advantages: Tensor, *, exponent_temperature: float) -> Tensor:
    """A exp(A / tau) (the weighting of REC, 2509.24203)."""
    return advantages * stats.safe_exp(advantages / exponent_temperature)


def _log_mean_exp(x: Tensor, valid: Tensor | None) -> Tensor:
    seen = x if valid is None else x.masked_fill(~valid, -torch.inf)
    count = torch.isfinite(seen).sum(1, keepdim=True).clamp(min=1)
    return seen.logsumexp(1, keepdim=True) - count.to(x.dtype).log()


def _outcome_entropy(outcomes: Tensor, valid: Tensor) -> Tensor:
    """Entropy in bits [P,1] of the distribution of equal outcomes [P,G] in each group."""
    same = (outcomes[:, :, None] == outcomes[:, None]) & valid[:, None] & valid[:, :, None]
    count = valid.sum(1, keepdim=True).clamp(min=1)
    share = (same.sum(2) / count).clamp(min=1e-12)
    return -(torch.where(valid, share.log2(), 0.0).sum(1, keepdim=True) / count)
