"""A prompt and its group of completions as one row of tokens: the completions' tree.

The G completions of a prompt share the prompt, and often their first words.  Written as a tree
(the prompt is the trunk, every distinct prefix of a completion is one node), a group is a single
sequence in which a token attends to its own ancestors only.  One forward pass over P such rows
gives what G full copies of every prompt would give, and every shared token is computed once.

The layout is integer work on small arrays and happens on the CPU, whatever the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTree:
    """P rows of L slots.  A row holds the prompt's real tokens, then the tree's nodes, then filler.

    Columns count the tokens before packing: S prompt columns, then G*T completion columns.

    source:  [P, L] column that a slot was taken from
    real:    [P, L] False on filler
    visible: [P, L, L] True where the token in slot i attends to the token in slot j
    rank:    [P, L] how many tokens precede a slot on its path from the root
    trunk:   [P] length of the prompt
    rows:    [N] distinct slots that predict a token, as p * L + slot
    row:     [M] index into ``rows`` of the slot that predicts sampled token m, ascending
    sampled: [M] index of sampled token m in the flattened [P, G, T]
    """

    source: Tensor
    real: Tensor
    visible: Tensor
    rank: Tensor
    trunk: Tensor
    rows: Tensor
    row: Tensor
    sampled: Tensor

    def to(self, device: torch.device) -> GroupTree:
        """The same layout with every tensor on ``device``."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return GroupTree(**moved)


def build_tree(prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor) -> GroupTree:
    """Lay out P groups.

    prompt_mask: [P, S] bool, True on real prompt tokens, padded on either side
    completion_ids: [P, G, T]; completion_mask: [P, G, T] bool, True on the first tokens of each

    The last token of a completion predicts nothing, so it is not part of the tree.
    """
    p, g, t = completion_ids.shape
    trunk = prompt_mask.sum(1)
    fed = completion_mask.clone()
    fed[..., -1] = False
    fed[..., :-1] &= completion_mask[..., 1:]
    twin = _first_twin(completion_ids, fed)
    node = fed & (twin == torch.arange(g)[None, :, None])

    keep = torch.cat([prompt_mask, node.view(p, g * t)], dim=1)
    sizes = keep.sum(1)
    length = int(sizes.max())
    source = torch.argsort(keep.to(torch.uint8), dim=1, descending=True, stable=True)[:, :length]
    slot_of_column = keep.cumsum(1) - 1
    node_slot = slot_of_column[:, -g * t :].view(p, g, t).gather(1, twin)

    depth = torch.arange(t).expand(p, g, t) + trunk[:, None, None]
    before = torch.cat([prompt_mask.cumsum(1) - 1, depth.reshape(p, g * t)], dim=1)
    predictor = torch.cat([(trunk - 1)[:, None, None].expand(p, g, 1), node_slot[..., :-1]], dim=2)
    predictor = predictor + length * torch.arange(p)[:, None, None]
    sampled = completion_mask.flatten().nonzero()[:, 0]
    by_slot, order = predictor.flatten()[sampled].sort(stable=True)
    rows, row = torch.unique_consecutive(by_slot, return_inverse=True)
    return GroupTree(
        source=source,
        real=torch.arange(length) < sizes[:, None],
        visible=_visible(trunk, sizes, length, node, node_slot),
        rank=before.gather(1, source),
        trunk=trunk,
        rows=rows,
        row=row,
        sampled=sampled[order],
    )


def _first_twin(ids: Tensor, fed: Tensor) -> Tensor:
    """[P, G, T]: the first completion of the group that has the same tokens up to and with t."""
    same = (ids[:, :, None] == ids[:, None]) & fed[:, :, None] & fed[:, None]
    return same.to(torch.uint8).cumprod(-1).argmax(2)


def _visible(trunk: Tensor, sizes: Tensor, length: int, node: Tensor, node_slot: Tensor) -> Tensor:
    """[P, L, L]: the trunk is causal, a node sees the trunk and its ancestors, filler itself."""
    p, _, t = node.shape
    slots = torch.arange(length)
    in_trunk = slots < trunk[:, None]
    queries = slots < sizes[:, None]
    causal = slots[:, None] >= slots
    visible = queries[:, :, None] & in_trunk[:, None] & causal
    visible |= torch.eye(length, dtype=torch.bool)
    ancestors = node[..., None] & torch.ones(t, t, dtype=torch.bool).tril()
    i, j, query, key = ancestors.nonzero(as_tuple=True)
    visible[i, node_slot[i, j, query], node_slot[i, j, key]] = True
    assert visible.shape == (p, length, length)
    return visible
