"""Log-probs and entropy of sampled tokens from hidden states, without the logits of the batch.

Logits are [N, V] in float32: for a vocabulary of 150,000 they outweigh everything else in the
step.  Here they exist for one chunk of rows at a time, and the backward pass recomputes them.
When all rows fit in one chunk, nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

CHUNK_BYTES = 2**28
"""Size that the float32 logits of one chunk may have."""

_BANNED = -1e30
"""Stands for -inf: its exponential is an exact 0, but its product with 0 is 0, not NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How logits become the distribution that tokens were sampled from: capped
    (``softcap * tanh(z / softcap)``), divided by ``temperature``, ``banned`` ids at -inf."""

    temperature: float = 1.0
    banned: tuple[int, ...] = ()
    softcap: float | None = None

    def log_softmax(self, logits: Tensor) -> Tensor:
        """[N, V] raw logits to float32 log-probs; may overwrite ``logits``."""
        scores = logits.float()
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.temperature != 1.0:
            scores = scores / self.temperature
        if self.banned:
            banned = torch.tensor(self.banned, device=scores.device)
            scores = scores.index_fill(1, banned, _BANNED)
        return scores.log_softmax(-1)

    def logit_gradient(self, gradient: Tensor, logprobs: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient for the raw logits, from that of the scores before the softmax (overwritten)."""
        if self.temperature != 1.0:
            gradient /= self.temperature
        if self.softcap is not None:
            assert logits is not None
            gradient *= 1 - torch.tanh(logits.float() / self.softcap) ** 2
        return gradient


def token_logprobs(
    hidden: Tensor,
    head: torch.nn.Linear,
    row: Tensor,
    token: Tensor,
    sampling: Sampling,
    *,
    with_entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob [M] of ``token`` [M] under the distribution of hidden state ``row`` [M] (ascending
    indices into ``hidden`` [N, D]), and the entropy [N] of every distribution; float32, in nats.

    Gradients reach ``hidden`` and the head.  Under autocast the head runs in autocast's type.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    rows_per_chunk = max(1, chunk_bytes // (4 * head.out_features))
    logprobs, entropy = _TokenLogprobs.apply(
        hidden.to(dtype),
        head.weight.to(dtype),
        None if head.bias is None else head.bias.to(dtype),
        row,
        token,
        sampling,
        with_entropy,
        rows_per_chunk,
    )
    return logprobs, entropy


@torch.no_grad()
def row_collisions(
    hidden: Tensor, head: torch.nn.Linear, sampling: Sampling, *, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Probability [N] that two draws from the distribution of a hidden state [N, D] agree, the sum
    over the vocabulary of squared probabilities; float32, chunked like the log-probs."""
    size = max(1, chunk_bytes // (4 * head.out_features))
    parts = [
        sampling.log_softmax(head(part.to(head.weight.dtype))).exp_().square_().sum(-1)
        for part in hidden.split(size)
    ]
    return torch.cat(parts)


def _chunks(row: Tensor, rows: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows, each with the slice of sampled tokens that belong to them; of no rows (no
    caption has a token) none."""
    starts = list(range(0, rows, size))
    if not starts:
        return
    edges = [0, len(row)]
    if len(starts) > 1:
        inner = torch.tensor(starts[1:], device=row.device)
        edges = [0, *torch.searchsorted(row, inner).tolist(), len(row)]
    for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True):
        yield slice(start, min(start + size, rows)), slice(first, last)


class _TokenLogprobs(torch.autograd.Function):
    """With p = softmax(z), H = -sum p log p: d log p_k / dz = onehot_k - p and
    dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: Tensor,
        token: Tensor,
        sampling: Sampling,
        with_entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor | None]:
        rows = len(hidden)
        picked = torch.empty(len(row), device=hidden.device)
        entropy = torch.empty(rows, device=hidden.device) if with_entropy else None
        kept: list[Tensor] = []
        for part, pairs in _chunks(row, rows, size):
            logits = linear(hidden[part], weight, bias)
            logprobs = sampling.log_softmax(logits)
            picked[pairs] = logprobs[row[pairs] - part.start, token[pairs]]
            if entropy is not None:
                entropy[part] = -(logprobs.exp() * logprobs).sum(-1)
            if rows <= size and any(ctx.needs_input_grad[:3]):
                kept = [logits, logprobs] if sampling.softcap is not None else [logprobs]
        ctx.save_for_backward(hidden, weight, bias, row, token, entropy, *kept)
        ctx.sampling, ctx.size = sampling, size
        return picked, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_picked: Tensor, d_entropy: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, row, token, entropy, *kept = ctx.saved_tensors
        sampling: Sampling = ctx.sampling
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        d_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(bias, dtype=torch.float32)
        pull = torch.zeros(len(hidden), device=hidden.device).index_add_(0, row, d_picked)
        for part, pairs in _chunks(row, len(hidden), ctx.size):
            logits = kept[0] if len(kept) == 2 else None
            if kept:
                logprobs = kept[-1]
            else:
                logits = linear(hidden[part], weight, bias)
                logprobs = sampling.log_softmax(logits)
            slope = -pull[part, None]
            if entropy is not None and d_entropy is not None:
                slope = slope - d_entropy[part, None] * (logprobs + entropy[part, None])
            gradient = logprobs.exp().mul_(slope)
            where = (row[pairs] - part.start, token[pairs])
            gradient.index_put_(where, d_picked[pairs], accumulate=True)
            gradient = sampling.logit_gradient(gradient, logprobs, logits).to(weight.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += gradient.t() @ hidden[part]
            if d_bias is not None:
                d_bias += gradient.sum(0)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(weight.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None
