"""Bounds of the ratio: (low, high), numbers or tensors that broadcast to [P,G,T], no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fixed(*, clip_low: float, clip_high: float) -> tuple[float, float]:
    """The ratio stays within [1 - clip_low, 1 + clip_high] (PPO, 1707.06347; two sides: DAPO)."""
    return 1 - clip_low, 1 + clip_high


def by_probability(
    old_logprobs: Tensor, *, clip_low: float, clip_high: float, highest: float
) -> tuple[Tensor, Tensor]:
    """Bounds on (ratio - 1) * ratio * q in place of ratio - 1, where q is the token's old
    probability, so that rare tokens may move further (DCPO, 2509.02333); at most ``highest``."""
    q = old_logprobs.detach().clamp(min=-40.0).exp()
    low = (1 + (1 - 4 * clip_low / q).clamp(min=0).sqrt()) / 2
    high = (1 + (1 + 4 * clip_high / q).sqrt()) / 2
    return low, high.clamp(max=highest)


def balanced(
    ratio: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    caption_weights: Tensor,
    total: Callable[[Tensor], Tensor],
    *,
    low_range: tuple[float, ...],
    high_range: tuple[float, ...],
    bound_step: float,
    balance: float,
) -> tuple[Tensor, Tensor]:
    """The first pair of bounds for which the mass of ratio times advantage is at least ``balance``
    times as large on the positive as on the negative side (BAPO, 2510.18927): from the lowest of
    both, raise the low one to its highest, then the high one; the last pair where none balances.

    low_range, high_range: lowest and highest bound, as ratios
    """
    lows, highs = (_steps(ends, bound_step, ratio) for ends in (low_range, high_range))
    with torch.no_grad():
        mass = advantages * token_weights * caption_weights[..., None]
        gain = torch.stack([(ratio.clamp(max=h) * mass.clamp(min=0)).sum() for h in highs])
        loss = torch.stack([(ratio.clamp(min=b) * -mass.clamp(max=0)).sum() for b in lows])
        gain, loss = total(torch.cat([gain, loss])).split([len(highs), len(lows)])
        path_low = torch.cat([lows, lows[-1].expand(len(highs) - 1)])
        path_high = torch.cat([highs[0].expand(len(lows)), highs[1:]])
        path_gain = torch.cat([gain[0].expand(len(lows)), gain[1:]])
        path_loss = torch.cat([loss, loss[-1].expand(len(highs) - 1)])
        enough = path_gain >= balance * path_loss
        chosen = int(enough.nonzero()[0, 0]) if bool(enough.any()) else len(enough) - 1
    return path_low[chosen], path_high[chosen]


def _steps(ends: tuple[float, ...], step: float, like: Tensor) -> Tensor:
    lowest, highest = ends
    count = round((highest - lowest) / step)
    return torch.linspace(lowest, highest, count + 1, dtype=like.dtype, device=like.device)
