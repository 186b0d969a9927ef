"""Means, spreads and sums over captions and groups, with masks; the arithmetic of all slots.

A group that is flat (all rewards equal) is exactly flat here: its deviations are 0, whatever the
rounding of the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_EXPONENT = 20.0
"""Log-ratios beyond this are continued along the tangent of exp, so that nothing overflows and
no gradient vanishes."""


def safe_exp(x: Tensor, limit: float = MAX_EXPONENT) -> Tensor:
    """exp(x) up to ``limit``, its tangent beyond: finite, with a gradient that never vanishes."""
    below = x.clamp(max=limit)
    return below.exp() * (1 + (x - below))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over tokens [..., T] -> [...]; what the mask hides may be anything, even inf."""
    return torch.where(mask.bool(), x, 0.0).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens [..., T] -> [...]; 0 where there is none."""
    return masked_sum(x, mask) / mask.sum(-1).clamp(min=1)


def with_own_gradient(value: Tensor, x: Tensor) -> Tensor:
    """``value``, which broadcasts to ``x``, with the gradient of ``x``."""
    return value.detach() + (x - x.detach())


def undiscounted_returns(rewards: Tensor) -> Tensor:
    """Rewards from each token on: [P,G] paid at the last token -> [P,G,1], [P,G,T] -> [P,G,T]."""
    return rewards[..., None] if rewards.ndim == 2 else rewards.flip(-1).cumsum(-1).flip(-1)


def group_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over the captions of each group, [P,G] -> [P,1]; 0 for an empty group."""
    weight = torch.ones_like(x) if valid is None else valid.to(x.dtype)
    return (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def center(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Deviations from the group's mean [P,G]; 0 for captions that are not valid.

    Raises ValueError where ``x`` is not [P,G], as for rewards of single tokens."""
    if x.ndim != 2:
        raise ValueError(f"a group's statistics want one number a caption, got {tuple(x.shape)}")
    seen = torch.ones_like(x, dtype=torch.bool) if valid is None else valid.bool()
    highest = x.masked_fill(~seen, -torch.inf).amax(1, keepdim=True)
    lowest = x.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
    deviation = x - group_mean(x, seen)
    return deviation.masked_fill(~seen | (highest <= lowest), 0.0)


def group_std(x: Tensor, valid: Tensor | None = None, ddof: int = 0) -> Tensor:
    """Standard deviation over the captions of each group, [P,G] -> [P,1]."""
    count = x.shape[1] if valid is None else valid.sum(1, keepdim=True)
    divisor = torch.as_tensor(count - ddof, dtype=x.dtype, device=x.device).clamp(min=1)
    return (center(x, valid).square().sum(1, keepdim=True) / divisor).sqrt()


def standardize(x: Tensor, valid: Tensor | None = None, eps: float = 0.0, ddof: int = 0) -> Tensor:
    """Deviations over spread plus ``eps`` [P,G]; 0 in flat groups, also when ``eps`` is 0."""
    deviation = center(x, valid)
    spread = group_std(x, valid, ddof) + eps
    return deviation / torch.where(spread > 0, spread, 1.0)


def whiten(x: Tensor, weight: Tensor | None = None, eps: float = 0.0, ddof: int = 0) -> Tensor:
    """Deviations over spread of the whole batch, weighted by ``weight`` (same shape as ``x``); 0 in
    a flat batch."""
    weight = torch.ones_like(x) if weight is None else weight.to(x.dtype).expand_as(x)
    total = weight.sum().clamp(min=1)
    seen = x[weight > 0]
    if not seen.numel() or bool(seen.max() <= seen.min()):
        return torch.zeros_like(x)
    deviation = x - (x * weight).sum() / total
    variance = (deviation.square() * weight).sum() / (total - ddof).clamp(min=1)
    spread = variance.sqrt() + eps
    return torch.where(weight > 0, deviation / torch.where(spread > 0, spread, 1.0), 0.0)


def leave_one_out_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """For every caption the mean of the others in its group [P,G]; 0 where there is no other."""
    weight = torch.ones_like(x) if valid is None else valid.to(x.dtype)
    others = (weight.sum(1, keepdim=True) - weight).clamp(min=1)
    return ((x * weight).sum(1, keepdim=True) - x * weight) / others


def pairwise(left: Tensor, right: Tensor) -> Tensor:
    """left_i - right_j for all pairs of a group, [P,G] and [P,G] -> [P,G,G]."""
    return left[:, :, None] - right[:, None, :]


def by_sign(advantages: Tensor, positive: float, negative: float) -> Tensor:
    """``positive`` where A >= 0, ``negative`` elsewhere, in the advantages' precision."""
    return negative + (positive - negative) * (advantages >= 0).to(advantages.dtype)


def largest_covariance(
    policy_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    total: Callable[[Tensor], Tensor],
    share: float,
) -> Tensor:
    """[P,G,T] bool: the ``share`` of the minibatch's tokens, at least one, with the largest product
    of deviations of advantage and log-prob from the minibatch's means."""
    logprobs = policy_logprobs.detach()
    advantages = advantages.expand_as(mask)
    count = total(mask.sum()).clamp(min=1)
    deviations = [
        x - total(torch.where(mask, x, 0.0).sum()) / count for x in (logprobs, advantages)
    ]
    product = (deviations[0] * deviations[1]).masked_fill(~mask, -torch.inf)
    product = product.float()
    k = (share * count.double()).floor().clamp(min=1)
    return (product >= kth_largest(product, k, total)) & mask


def kth_largest(x: Tensor, k: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The k-th largest value of all ranks' ``x`` together, exactly and without moving them: a
    binary search over float32 bit patterns, which as integers are in the order of the values."""
    bits = x.float().contiguous().view(torch.int32).long()
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    low = torch.full((), -(2**31), dtype=torch.long, device=x.device)
    for bit in range(31, -1, -1):
        middle = low + 2**bit
        low = torch.where(total((keys >= middle).sum()) >= k, middle, low)
    magnitude = low.abs().to(torch.int32).view(torch.float32)
    return torch.where(low < 0, -magnitude, magnitude).to(x.dtype)
