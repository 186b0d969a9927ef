"""Attention of the nodes of a tree (``tree.py``) that grows with its branches, not their square.

A node sees the trunk and the nodes of its own branch: those that begin with the same token.  One
masked attention over a row makes it multiply with the nodes of all other branches too.  Here nodes
attend to the trunk and, apart from that, to the block of whole branches that they are in, and the
two are put together by their normalizers, the log-sum-exp l of the scores of each:

    o = (exp(l_trunk) o_trunk + exp(l_block) o_block) / exp(l)
    exp(l) = exp(l_trunk) + exp(l_block)

The probability of a key of score s is exp(s - l) wherever it is, so that in the backward pass each
part needs but o and l of the whole.  (Ring attention splits keys over devices in this way:
arXiv 2310.01889.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayrl.learner.tree import GroupTree

_LEAST = 16
"""Slots of a block at least: small products take as long as none."""
_WORTH_IT = 180 * 180
"""How many products of a node with a node blocks must save in a row: with eight captions of 20
tokens, they cost about what they save."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """P rows of L slots, K of them the trunk's, whose n nodes are in R blocks of B slots in all.

    trunk:  K
    below:  additive [P, 1, n, K], what nodes see of the trunk; None where they see all of it
    within: additive [R, 1, B, B], what nodes see of their block
    fold:   [R * B] the node that a slot of a block was taken from, as p * n + node.  Slots that are
        left over repeat some node; they see themselves, and nobody sees them
    unfold: [P, n] the slot of the blocks that a node is in, as block * B + slot
    """

    trunk: int
    below: Tensor | None
    within: Tensor
    fold: Tensor
    unfold: Tensor

    def folded(self, nodes: Tensor) -> Tensor:
        """[R, heads, B, ...] from [P, heads, n, ...]."""
        blocks, _, size, _ = self.within.shape
        taken = nodes.transpose(1, 2).flatten(0, 1).index_select(0, self.fold)
        return taken.unflatten(0, (blocks, size)).transpose(1, 2)

    def unfolded(self, blocks: Tensor) -> Tensor:
        """The nodes, [P, n, heads, ...], from [R, heads, B, ...]."""
        taken = blocks.transpose(1, 2).flatten(0, 1).index_select(0, self.unfold.flatten())
        return taken.unflatten(0, self.unfold.shape)


def branches_of(tree: GroupTree, mask: Tensor) -> Branches | None:
    """The blocks of a tree on the CPU; None where they would save little.

    mask: additive [P, 1, n, L], of ``tree.nodes``
    """
    p, count, _ = tree.nodes.shape
    if count <= _LEAST or count**2 < _WORTH_IT:
        return None
    trunk = tree.trunk_slots
    own = tree.nodes[:, :, trunk:]
    # A branch's first node precedes the others.  Filler sees no node, and is a branch of its own.
    first = torch.where(own.any(2), own.to(torch.uint8).argmax(2), torch.arange(count))
    unfold, blocks, size = _packed(first.numpy())
    if p * count**2 - blocks * size**2 < _WORTH_IT * p:
        return None
    node = np.zeros(blocks * size, np.int64)
    node[unfold] = np.arange(count)
    row = np.zeros(blocks * size, np.int64)
    row[unfold] = np.arange(p)[:, None]
    taken = np.zeros(blocks * size, bool)
    taken[unfold] = True
    rows, nodes, real = (torch.from_numpy(each).view(blocks, size) for each in (row, node, taken))
    seen = own[rows[:, :, None], nodes[:, :, None], nodes[:, None]]
    seen &= real[:, :, None] & real[:, None]
    seen |= torch.eye(size, dtype=torch.bool)
    within = torch.zeros(seen.shape, dtype=mask.dtype)
    within.masked_fill_(~seen, torch.finfo(mask.dtype).min)
    return Branches(
        trunk=trunk,
        # A copy, for a view would hold the mask, which holds this.
        below=None if bool((tree.trunk == trunk).all()) else mask[..., :trunk].contiguous(),
        within=within[:, None],
        fold=(rows * count + nodes).flatten(),
        unfold=torch.from_numpy(unfold),
    )


def _packed(first: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int, int]:
    """Put whole branches into blocks, none of two rows: the slot of each node [P, n], how many
    blocks there are, and their size, which the largest branch sets.

    first: [P, n] the node that a node's branch begins with
    """
    order = np.argsort(first, axis=1, kind="stable")
    counts = [np.unique(row, return_counts=True)[1] for row in first]
    size = max(_LEAST, *(int(row.max()) for row in counts))
    slots, block = np.empty_like(first), -1
    for p, branches in enumerate(counts):
        block, used, starts = block + 1, 0, []
        for nodes in branches.tolist():
            if used + nodes > size:
                block, used = block + 1, 0
            starts.append(block * size + used)
            used += nodes
        before = np.cumsum(branches) - branches
        slots[p, order[p]] = np.arange(first.shape[1]) + np.repeat(starts - before, branches)
    return slots, block + 1, size


class BranchAttention(torch.autograd.Function):
    """Attention output [P, n, heads, D] of the nodes' queries [P, heads, n, D] over keys and values
    [P, heads, L, D] on the CPU, as :class:`Branches` say."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, where: Branches
    ) -> Tensor:
        k = where.trunk
        below, l_below = _attend(
            query, key[:, :, :k], value[:, :, :k], attn_mask=where.below, scale=scale
        )
        within, l_within = _attend(
            *(where.folded(each) for each in (query, key[:, :, k:], value[:, :, k:])),
            attn_mask=where.within,
            scale=scale,
        )
        below, l_below = below.transpose(1, 2), l_below.transpose(1, 2)
        within, l_within = where.unfolded(within), where.unfolded(l_within)
        share = torch.sigmoid(l_within - l_below)[..., None]
        output = below.lerp(within, share.to(below.dtype))
        ctx.save_for_backward(query, key, value, output, l_below.logaddexp(l_within))
        ctx.scale, ctx.where = scale, where
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        where, scale, k = ctx.where, ctx.scale, ctx.where.trunk
        query, key, value, output, normalizer = ctx.saved_tensors
        # [P, heads, n, ...], as the others are.
        gradient, output, normalizer = (
            each.transpose(1, 2) for each in (gradients[0], output, normalizer)
        )
        of_query, *of_trunk = _attend_backward(
            gradient,
            query,
            key[:, :, :k],
            value[:, :, :k],
            output,
            normalizer,
            0.0,
            False,
            attn_mask=where.below,
            scale=scale,
        )
        own = gradient, query, key[:, :, k:], value[:, :, k:], output, normalizer
        blocks = _attend_backward(
            *(where.folded(each) for each in own), 0.0, False, attn_mask=where.within, scale=scale
        )
        more, *of_nodes = (where.unfolded(each).transpose(1, 2) for each in blocks)
        pairs = zip(of_trunk, of_nodes, strict=True)
        return (of_query + more, *(torch.cat(pair, dim=2) for pair in pairs), None, None)
