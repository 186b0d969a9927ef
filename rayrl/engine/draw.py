"""How an engine of our own chooses tokens: from numbers that were drawn before it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Captions of P prompts: ``ids`` [P, G, T] and ``logprobs`` [P, G, T].  What comes after a
    caption's first end token means nothing."""

    ids: Tensor
    logprobs: Tensor


def uniforms(seeds: Sequence[int], group_size: int, max_tokens: int) -> Tensor:
    """[P, G, T] float64 in [0, 1): what decides the tokens of caption g of prompt p is drawn from
    a generator seeded with ``seeds[p] + g``, whatever else is in the batch."""
    rows = [
        torch.rand(
            max_tokens, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64
        )
        for seed in seeds
        for i in range(group_size)
    ]
    return torch.stack(rows).view(len(seeds), group_size, max_tokens)


def choose(logprobs: Tensor, uniform: Tensor | None) -> Tensor:
    """Token ids [R] from log-probs [R, V], by inverting the distribution function at ``uniform``
    [R]; the arg-max where there is none.

    One number a token, where Gumbel noise takes one for every word of the vocabulary.  Ids of
    probability 0 are never chosen."""
    if uniform is None:
        return logprobs.argmax(-1)
    # In float32 the sums over a large vocabulary would lose its rare words.
    edges = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # The largest float64 below 1, times the total, could round to the total: no edge is above it.
    heights = uniform.clamp(max=1 - 1e-12) * edges[:, -1]
    return torch.searchsorted(edges, heights[:, None], right=True)[:, 0]
