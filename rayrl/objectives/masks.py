"""Weights [P,G,T] of tokens, known before the update, that also enter denominators."""

from __future__ import annotations

import math

from torch import Tensor


def sampled_only(forced: Tensor) -> Tensor:
    """0 for tokens that were given as a hint (GHPO, 2507.10628)."""
    return 1 - forced.float()


def improbable(old_logprobs: Tensor, *, probable: float) -> Tensor:
    """0 for tokens whose old probability is ``probable`` or more (the probability mask of SPO,
    2505.23564)."""
    return (old_logprobs < math.log(probable)).to(old_logprobs.dtype)
