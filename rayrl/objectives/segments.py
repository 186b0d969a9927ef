"""Segments of captions: ids [P,G,T] from 0 on that grow along the caption."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fixed_length(mask: Tensor, *, segment_length: int) -> Tensor:
    """Runs of ``segment_length`` tokens."""
    return torch.where(mask, (mask.cumsum(-1) - 1).clamp(min=0) // segment_length, 0)


def at_improbable(
    old_logprobs: Tensor, mask: Tensor, *, cut_probability: float, cut_every: int
) -> Tensor:
    """A new segment starts at every ``cut_every``-th token whose old probability is below
    ``cut_probability``: where the policy had a choice (SPO, 2505.23564)."""
    choice = mask & (old_logprobs < math.log(cut_probability))
    count = choice.cumsum(-1)
    starts = choice & (count % cut_every == 0) & (mask.cumsum(-1) > 1)
    return torch.where(mask, starts.cumsum(-1), 0)
