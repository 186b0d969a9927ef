"""A scorer that ranks the captions of an image and is retrained on its mistakes (RewardRanker, read
in its abstract).

A score is linear in features of the caption, and what the scorer has learned is a function of its
training set alone: differences between the features of a better and of a worse caption of the same
image, as the true reward has them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hard_negatives(scores: Tensor, rewards: Tensor, valid: Tensor) -> Tensor:
    """[P] bool: the caption with the highest score [P,G] has less than the group's mean of the true
    reward [P,G]."""
    chosen = scores.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    mean = torch.where(valid, rewards, 0.0).sum(1) / valid.sum(1).clamp(min=1)
    return rewards.gather(1, chosen)[:, 0] < mean


def pairwise_logistic(pairs: Tensor, passes: int) -> Tensor:
    """Weights w [D] after ``passes`` steps of gradient descent from 0 on the mean of
    -log sigmoid(w d) over pairs d [M,D] (Bradley and Terry's model); 0 without a pair.

    The steps are 4 / mean |d|^2 long: no more than one over the largest curvature, so each
    descends.
    """
    weights = pairs.new_zeros(pairs.shape[-1])
    if not len(pairs):
        return weights
    rate = 4 / pairs.square().sum(1).mean().clamp(min=1e-12)
    for _ in range(passes):
        weights = weights + rate * (torch.sigmoid(-(pairs @ weights)) @ pairs) / len(pairs)
    return weights


def differences(features: Tensor, rewards: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """[M,D] of the groups in which the first caption is truly better, captions by index [P]."""
    rows = torch.arange(len(features), device=features.device)
    really = rewards[rows, better] > rewards[rows, worse]
    return (features[rows, better] - features[rows, worse])[really]
