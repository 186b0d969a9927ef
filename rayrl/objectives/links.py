"""Losses [P,G,G] of pairs from their margins h."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayrl.objectives.stats import pairwise


def logistic(margins: Tensor) -> Tensor:
    """-log sigmoid(h) (DPO, 2305.18290)."""
    return -logsigmoid(margins)


def sigmoid(margins: Tensor) -> Tensor:
    """-sigmoid(h), bounded: no margin runs away (MPO, 2312.16430)."""
    return -torch.sigmoid(margins)


def linear(margins: Tensor) -> Tensor:
    """-h (DisCO-b, 2505.12366)."""
    return -margins


def squared(margins: Tensor, *, beta: float) -> Tensor:
    """(h / beta - 1 / (2 beta))^2: the difference of scores aims at 1 / (2 beta) (IPO,
    2310.12036)."""
    return (margins / beta - 1 / (2 * beta)).square()


def hinge(margins: Tensor) -> Tensor:
    """max(0, 1 - h) (SLiC, 2305.10425)."""
    return (1 - margins).clamp(min=0)


def robust(margins: Tensor, *, label_noise: float) -> Tensor:
    """The logistic loss, unbiased where a share of the preferences is flipped (2403.00409)."""
    kept, flipped = -logsigmoid(margins), -logsigmoid(-margins)
    return ((1 - label_noise) * kept - label_noise * flipped) / (1 - 2 * label_noise)


def soft_label(margins: Tensor, rewards: Tensor, *, label_slope: float) -> Tensor:
    """-p log sigmoid(h) - (1 - p) log sigmoid(-h), p = sigmoid(slope (r_i - r_j)) (the smoothed
    labels of SmPO, 2506.02698, read in its abstract)."""
    p = torch.sigmoid(label_slope * pairwise(rewards, rewards))
    return -p * logsigmoid(margins) - (1 - p) * logsigmoid(-margins)


def focal(margins: Tensor, *, hardness: float) -> Tensor:
    """-(1 - sigmoid(h))^gamma log sigmoid(h), the weight held constant: hard pairs count more
    (HaNoRec, whose abstract gives no formula)."""
    weight = torch.sigmoid(-margins).pow(hardness).detach()
    return -weight * logsigmoid(margins)
