"""The last decoder layer, for the tokens whose states are read.

Log-probs are read from the states of a prompt's last token and of the nodes above it (``tree.py``).
Of all other tokens the last layer needs keys and values alone: no queries, no feed-forward part, no
gradient through either.  The layers below are needed whole, for there those tokens are attended to
in the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrl.learner.tree import GroupTree

_READ = "rayrl_read"
"""Of a mask: which tokens are read.  Of a layer: that it looks for this."""
_KNOWN = {
    # What such a layer gives its attention is a norm of what it gets, and nothing else.
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3VLTextDecoderLayer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Tokens of P rows whose states are read: each prompt's last, and all n nodes.

    trunk: K, the slots below the nodes
    last:  [P] the slot of each prompt's last token
    below: additive [P, 1, 1, K], which of the trunk's slots hold a token
    """

    trunk: int
    last: Tensor
    below: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """[P, 1 + n, D] from [P, K + n, D], or from [1, K + n, D] that is the same for all."""
        rows = rows.expand(len(self.last), -1, -1)
        last = rows[torch.arange(len(rows), device=rows.device), self.last]
        return torch.cat([last[:, None], rows[:, self.trunk :]], dim=1)


def mark_read(mask: Tensor, tree: GroupTree) -> None:
    """Have the last layer (:func:`read_in_last_layer`) under this mask, of ``tree.nodes``, give the
    states that are read alone."""
    trunk = tree.trunk_slots
    empty = torch.arange(trunk, device=mask.device) >= tree.trunk[:, None]
    below = torch.zeros(empty.shape, dtype=mask.dtype, device=mask.device)
    below.masked_fill_(empty, torch.finfo(mask.dtype).min)
    setattr(mask, _READ, Read(trunk=trunk, last=tree.trunk - 1, below=below[:, None, None]))


def read_in_last_layer(decoder: Any) -> None:
    """Have a decoder's last layer heed :func:`mark_read`, from now on.  One of a kind that is not
    known to allow it gives all states, as ever."""
    layer, norm = _last(decoder)
    if norm is not None and not hasattr(layer, _READ):
        setattr(layer, _READ, True)
        layer.forward = LastLayer(layer, norm, layer.forward)


def unread_weights(decoder: Any) -> int:
    """How many elements of a decoder's matrices a token whose state is not read is not multiplied
    with."""
    layer, norm = _last(decoder)
    if norm is None:
        return 0
    keys = ("self_attn.k_proj.", "self_attn.v_proj.")
    named = layer.named_parameters()
    return sum(p.numel() for n, p in named if p.ndim == 2 and not n.startswith(keys))


def _last(decoder: Any) -> tuple[Any, Any]:
    """The last layer and its first norm, None where that is not all that attention is given."""
    layer = getattr(decoder, "layers", [None])[-1]
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    return layer, layer.input_layernorm if kinds & _KNOWN else None


class LastLayer:
    """The ``forward`` of a last layer."""

    def __init__(self, layer: Any, norm: Any, forward: Callable[..., Tensor]) -> None:
        self._attention, self._norm = layer.self_attn, norm
        self.forward = forward

    def __call__(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """[P, 1 + n, D] of [P, K + n, D] under a marked mask, else of all."""
        read: Read | None = getattr(attention_mask, _READ, None)
        if read is None:
            return self.forward(hidden_states, attention_mask=attention_mask, **options)
        where = options.pop("position_embeddings")
        taken: list[tuple[Tensor, Tensor]] = []
        self._attention(
            hidden_states=self._norm(hidden_states[:, : read.trunk]),
            attention_mask=None,
            position_embeddings=tuple(each[:, : read.trunk] for each in where),
            take=taken,
            **options,
        )
        return self.forward(
            read.of(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=tuple(read.of(each) for each in where),
            trunk=(*taken[0], read.below),
            **options,
        )
