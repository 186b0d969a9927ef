"""Formulas of rewards, for reward terms and for the shaping of rewards."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

NO_WEIGHTS: Mapping[str, float] = {}
"""Of reward terms by name; one without a weight counts once."""


def counted(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], named: Collection[str] = ()
) -> dict[str, Tensor]:
    """The terms [P,G] that an objective counts: those whose weight under reward.terms is not 0, for
    that says to log a term only, and those that a parameter has ``named``."""
    return {k: v for k, v in terms.items() if k in named or weights.get(k, 1.0) != 0}


def calibrated(rewards: Tensor, confidence: Tensor, mean: float) -> Tensor:
    """r + sign(r >= mean) |r| (confidence - 1/2) (PPO-C, 2410.09724)."""
    sign = torch.where(rewards >= mean, 1.0, -1.0)
    return rewards + sign * rewards.abs() * (confidence - 0.5)


def efficiency(cost: Tensor, best_cost: Tensor, *, smoothing: float = 1.0) -> Tensor:
    """sin(f pi / (2 n)), f = 2 m n / (m + n), for cost m and best cost n; cos(m pi / (2 m + c))
    where n is 0; 1 where both are (OTC-PO, 2504.14870)."""
    free = torch.cos(cost * math.pi / (2 * cost + smoothing))
    n = torch.where(best_cost > 0, best_cost, 1.0)
    f = 2 * cost * n / (cost + n)
    return torch.where(best_cost > 0, torch.sin(f * math.pi / (2 * n)), free)


def self_cider(similarity: Tensor) -> Tensor:
    """Diversity [...] in [0,1] of G captions with pairwise similarities [...,G,G]:
    -log(sqrt(l_max) / sum sqrt(l)) / log G over the eigenvalues l (Self-CIDEr, 1903.12020); 0 for
    one caption."""
    roots = torch.linalg.eigvalsh(similarity).clamp(min=0).sqrt()
    size = similarity.shape[-1]
    if size < 2:
        return torch.zeros_like(roots[..., 0])
    return -(roots.amax(-1) / roots.sum(-1)).log() / math.log(size)
