"""Reducers: from the losses [P,G,T] of tokens to one number.

Denominators come from the whole minibatch (:class:`Normalizer`), never from the tensors at hand,
so that the losses of micro-batches, or of ranks, add up to the loss of the minibatch.
``caption_weights`` [P,G] is 0 for dropped captions, ``token_weights`` [P,G,T] 0 on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    """Weighted counts of a minibatch; sums over ranks when there are several."""

    tokens: float
    captions: float
    groups: float
    """Groups that the loss of pairs or groups reads: those with at least one pair."""

    def __add__(self, other: Normalizer) -> Normalizer:
        return Normalizer(
            self.tokens + other.tokens,
            self.captions + other.captions,
            self.groups + other.groups,
        )


def _over(total: Tensor, count: float) -> Tensor:
    """total / count; a minibatch in which everything was dropped has loss 0 and no gradient."""
    return total / count if count > 0 else total * 0.0


def _token_sums(losses: Tensor, token_weights: Tensor) -> Tensor:
    return torch.where(token_weights > 0, losses * token_weights, 0.0).sum(-1)


def token_mean(
    losses: Tensor, token_weights: Tensor, caption_weights: Tensor, normalizer: Normalizer
) -> Tensor:
    """Mean over all tokens of the minibatch (DAPO, 2503.14476; the captioning habit)."""
    total = (_token_sums(losses, token_weights) * caption_weights).sum()
    return _over(total, normalizer.tokens)


def sequence_mean_token_mean(
    losses: Tensor, token_weights: Tensor, caption_weights: Tensor, normalizer: Normalizer
) -> Tensor:
    """Mean over captions of the mean over their tokens (GRPO, 2402.03300)."""
    means = _token_means(losses, token_weights)
    return _over((means * caption_weights).sum(), normalizer.captions)


def sequence_mean_token_sum(
    losses: Tensor, token_weights: Tensor, caption_weights: Tensor, normalizer: Normalizer
) -> Tensor:
    """Mean over captions of the sum over their tokens: the caption is one action (REINFORCE)."""
    total = (_token_sums(losses, token_weights) * caption_weights).sum()
    return _over(total, normalizer.captions)


def constant_length(
    losses: Tensor,
    token_weights: Tensor,
    caption_weights: Tensor,
    normalizer: Normalizer,
    *,
    max_tokens: int,
) -> Tensor:
    """Sum over tokens divided by captions times a constant length (Dr.GRPO, 2503.20783), which is
    that of the longest caption that may be sampled and never that of the batch.

    Raises ValueError for a length below 1, with which nothing would be learned."""
    if max_tokens < 1:
        raise ValueError(f"constant_length: max_tokens {max_tokens}, want at least 1")
    total = (_token_sums(losses, token_weights) * caption_weights).sum()
    return _over(total, normalizer.captions * max_tokens)


def sequence_sum_token_mean(
    losses: Tensor, token_weights: Tensor, caption_weights: Tensor
) -> Tensor:
    """Sum over captions of the mean over their tokens (DCPO's OTM, 2509.02333): no mean over the
    batch, so the gradient grows with the number of captions."""
    return (_token_means(losses, token_weights) * caption_weights).sum()


def _token_means(losses: Tensor, token_weights: Tensor) -> Tensor:
    count = token_weights.sum(-1)
    return _token_sums(losses, token_weights) / torch.where(count > 0, count, 1.0)
