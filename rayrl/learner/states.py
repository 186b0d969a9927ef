"""The hidden states behind the log-probs, for what else is read from them: values, other heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayrl.learner.chunked import CHUNK_BYTES, Sampling, row_collisions, token_logprobs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenStates:
    """The states that predict the sampled tokens, once each although captions share prefixes.  The
    state that predicts token t has seen the prompt, the image and the tokens before t.

    hidden:  [N, D], with gradient where the pass had one
    row:     [M] index into ``hidden`` of the state that predicts sampled token m, ascending
    sampled: [M] index of sampled token m in the flattened [P, G, T]
    ids:     [P, G, T]
    head, sampling: how states become log-probs
    """

    hidden: Tensor
    row: Tensor
    sampled: Tensor
    ids: Tensor
    head: torch.nn.Linear
    sampling: Sampling

    def spread(self, values: Tensor) -> Tensor:
        """What belongs to states [N, ...] as what belongs to tokens [P, G, T, ...], 0 on others."""
        return self._placed(values[self.row])

    def logprobs(
        self,
        hidden: Tensor | None = None,
        *,
        with_entropy: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [P, G, T] of the sampled tokens, and the entropy of their distributions, after
        ``hidden`` [N, D] in place of the states' own."""
        picked, entropy = token_logprobs(
            self.hidden if hidden is None else hidden,
            self.head,
            self.row,
            self.ids.flatten()[self.sampled],
            self.sampling,
            with_entropy=with_entropy,
            chunk_bytes=chunk_bytes,
        )
        return self._placed(picked), None if entropy is None else self.spread(entropy)

    def collisions(self, *, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
        """The sum over the vocabulary of squared probabilities [P, G, T], without gradient."""
        return self.spread(
            row_collisions(self.hidden, self.head, self.sampling, chunk_bytes=chunk_bytes)
        )

    def _placed(self, of_tokens: Tensor) -> Tensor:
        flat = of_tokens.new_zeros(self.ids.numel(), *of_tokens.shape[1:])
        return flat.index_put((self.sampled,), of_tokens).view(*self.ids.shape, *flat.shape[1:])
