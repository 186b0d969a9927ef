"""Attention over the rows of a tree (``tree.py``) for decoders of transformers.

The trunk is plain causal attention, for which kernels need no mask and skip half of the work; only
the nodes above it need one.  With 1,000 prompt tokens below 200 nodes, that is a third of the
work of one masked attention over the whole row.  On the CPU nodes that share nothing but the trunk
are not multiplied with each other either (``branches.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayrl.learner.branches import BranchAttention, branches_of
from rayrl.learner.tree import GroupTree

NAME = "rayrl_tree"
# Of a mask: its blocks.  Models hand the mask on as it is, and nothing else to all of them.
_BRANCHES = "rayrl_branches"


def mark_branches(mask: Tensor, tree: GroupTree) -> None:
    """Have ``tree_attention`` under this mask, of ``tree.nodes``, use the tree's branches where
    that saves work."""
    if mask.device.type == "cpu":
        setattr(mask, _BRANCHES, branches_of(tree, mask))


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    take: list[tuple[Tensor, Tensor]] | None = None,
    trunk: tuple[Tensor, Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention output [P, L, heads, D] of queries [P, heads, L, D].

    attention_mask: additive [P, 1, n, L] for the last n queries, the others being causal among
    themselves.  With a mask for all queries, or none, this is transformers' ``sdpa``.

    A last layer of which not all is read (``last_layer.py``) asks twice: with ``take`` for the keys
    and values of the trunk, which are put there and nothing computed; then for a prompt's last
    token and n nodes, with ``trunk``, those keys and values and what the last token sees of them.
    """
    if take is not None:
        take.append((key, value))
        return query.new_zeros(1).expand(*query.transpose(1, 2).shape), None
    if trunk is not None:
        keys, values, below = trunk
        last, _ = sdpa_attention_forward(module, query[:, :, :1], keys, values, below, **options)
        key = torch.cat([keys, key[:, :, 1:]], dim=2)
        value = torch.cat([values, value[:, :, 1:]], dim=2)
        nodes = _node_attention(module, query[:, :, 1:], key, value, attention_mask, **options)
        return torch.cat([last, nodes], dim=1), None
    length = query.shape[2]
    n = length if attention_mask is None else attention_mask.shape[2]
    if n == 0:  # completions of one token: the prompt predicts them all
        n, attention_mask = length, None
    if n == length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    k = length - n
    prompt, _ = sdpa_attention_forward(
        module, query[:, :, :k], key[:, :, :k], value[:, :, :k], None, **options
    )
    nodes = _node_attention(module, query[:, :, k:], key, value, attention_mask, **options)
    return torch.cat([prompt, nodes], dim=1), None


def _node_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> Tensor:
    """[P, n, heads, D] of the nodes' queries [P, heads, n, D], keys and values [P, heads, L, D]."""
    branches = getattr(mask, _BRANCHES, None)
    if branches is None or options.get("dropout") or options.get("position_bias") is not None:
        nodes, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return nodes
    if torch.is_autocast_enabled("cpu"):
        # As autocast does for sdpa, whose kernels are called here by their own names.
        query, key, value = (each.to(mask.dtype) for each in (query, key, value))
    output: Tensor = BranchAttention.apply(query, key, value, options.get("scaling"), branches)
    return output


def use_tree_attention(decoder: Any) -> bool:
    """Switch a decoder from ``sdpa`` to ``tree_attention``; False if it runs on something else.

    The switch stays, because activation checkpointing runs the layers again in the backward pass.
    Everywhere else the decoder computes what it computed before.
    """
    if decoder.config._attn_implementation == "sdpa":
        decoder.config._attn_implementation = NAME
    return bool(decoder.config._attn_implementation == NAME)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
