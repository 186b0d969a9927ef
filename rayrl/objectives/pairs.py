"""Pairs of captions of a group: pair_weights [P,G,G], how much "i is better than j" counts.

A group's weights add up to 1 unless said, and are all 0 where it has no pair: such a group is not
counted in the mean over groups.  ``valid`` is False for captions that were dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrl.objectives import stats


def best_worst(rewards: Tensor, valid: Tensor, *, min_gap: float) -> Tensor:
    """The best caption against the worst, where their rewards differ by more than ``min_gap``."""
    best = rewards.masked_fill(~valid, -torch.inf).argmax(1)
    worst = rewards.masked_fill(~valid, torch.inf).argmin(1)
    return _single(rewards, best, worst, valid.any(1), min_gap)


def all_pairs(rewards: Tensor, valid: Tensor, *, min_gap: float) -> Tensor:
    """Every pair whose rewards differ by more than ``min_gap``, all alike."""
    return _mean((stats.pairwise(rewards, rewards) > min_gap) & _both(valid), rewards)


def across_levels(labels: Tensor, valid: Tensor) -> Tensor:
    """Every pair of different labels, all alike (TRPA, 2504.04524; good against bad: DisCO,
    2505.12366)."""
    return _mean((stats.pairwise(labels, labels) > 0) & _both(valid), labels)


def shorter_good(
    labels: Tensor,
    lengths: Tensor,
    valid: Tensor,
    *,
    max_tokens: int,
    brevity_temperature: float,
) -> Tensor:
    """Good against bad captions (labels above and below 1/2), the good ones weighted by
    softmax((1 - n / max_tokens) / tau) among themselves, n their length (DRPO, 2510.04474).

    Raises ValueError for ``max_tokens`` below 1."""
    if max_tokens < 1:
        raise ValueError(f"shorter_good: max_tokens {max_tokens}, want at least 1")
    good, bad = (labels > 0.5) & valid, (labels <= 0.5) & valid
    utility = (1 - lengths.to(labels.dtype) / max_tokens) / brevity_temperature
    share = torch.softmax(utility.masked_fill(~good, -1e30), 1) * good
    uniform = bad.to(labels.dtype) / bad.sum(1, keepdim=True).clamp(min=1)
    return share[:, :, None] * uniform[:, None]


def satisfying_violating(rewards: Tensor, judge_ok: Tensor, valid: Tensor) -> Tensor:
    """The best caption that satisfies all judges against the worst that does not, or the worst at
    all where none violates; no pair where none satisfies (CODPO, 2409.20370)."""
    satisfying, violating = judge_ok.bool() & valid, ~judge_ok.bool() & valid
    losers = torch.where(violating.any(1, keepdim=True), violating, valid)
    best = rewards.masked_fill(~satisfying, -torch.inf).argmax(1)
    worst = rewards.masked_fill(~losers, torch.inf).argmin(1)
    there = satisfying.any(1) & (best != worst)
    return _single(rewards, best, worst, there, -torch.inf)


def best_against_earlier(rewards: Tensor, earlier: Tensor, valid: Tensor) -> Tensor:
    """The best of the policy's captions against each of those of an earlier checkpoint (SePPO,
    2410.05255)."""
    own, old = valid & ~earlier.bool(), valid & earlier.bool()
    best = rewards.masked_fill(~own, -torch.inf).argmax(1)
    chosen = torch.zeros_like(own).scatter(1, best[:, None], own.any(1, keepdim=True))
    return _mean(chosen[:, :, None] & old[:, None], rewards)


def half_square(rewards: Tensor, valid: Tensor) -> Tensor:
    """1 / G^2 for every unordered pair, equal rewards included (PRDP, 2402.08714)."""
    count = valid.sum(1).clamp(min=1)[:, None, None].to(rewards.dtype)
    return (_both(valid) & _lower(rewards)) / count.square()


def each_once(rewards: Tensor, valid: Tensor) -> Tensor:
    """1 for every unordered pair (P3O, 2310.00212)."""
    return (_both(valid) & _lower(rewards)).to(rewards.dtype)


def _both(valid: Tensor) -> Tensor:
    return valid[:, :, None] & valid[:, None]


def _lower(rewards: Tensor) -> Tensor:
    size = rewards.shape[1]
    return torch.ones(size, size, dtype=torch.bool, device=rewards.device).tril(-1)


def _mean(chosen: Tensor, like: Tensor) -> Tensor:
    weights = chosen.to(like.dtype)
    return weights / weights.sum((1, 2), keepdim=True).clamp(min=1)


def _single(rewards: Tensor, best: Tensor, worst: Tensor, there: Tensor, min_gap: float) -> Tensor:
    weights = rewards.new_zeros(*rewards.shape, rewards.shape[1])
    rows = torch.arange(len(rewards), device=rewards.device)
    gap = rewards[rows, best] - rewards[rows, worst]
    weights[rows, best, worst] = (there & (gap > min_gap)).to(rewards.dtype)
    return weights
