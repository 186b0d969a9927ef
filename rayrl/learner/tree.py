"""A prompt and its group of completions as one row of tokens: the completions' tree.

The G completions of a prompt share the prompt, and often their first words.  Written as a tree
(the prompt is the trunk, every distinct prefix of a completion is a node above it), a group is a
single sequence in which a token attends to its own ancestors only.  One forward pass over P such
rows gives what G full copies of every prompt would give, and every shared token is computed once.

The layout is integer work on small arrays and happens on the CPU, whatever the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTree:
    """P rows of L slots: K trunk slots (the prompt's real tokens, then filler), then L - K node
    slots (the tree's nodes, then filler).

    Columns count the tokens before packing: S prompt columns, then G*T completion columns.

    source:  [P, L] column that a slot was taken from
    real:    [P, L] False on filler
    nodes:   [P, L - K, L] True where the token in node slot i attends to the token in slot j
    rank:    [P, L] how many tokens precede a slot on its path from the root
    trunk:   [P] length of each prompt, at most K
    rows:    [N] distinct slots that predict a token, as p * L + slot
    row:     [M] index into ``rows`` of the slot that predicts sampled token m, ascending
    sampled: [M] index of sampled token m in the flattened [P, G, T]
    """

    source: Tensor
    real: Tensor
    nodes: Tensor
    rank: Tensor
    trunk: Tensor
    rows: Tensor
    row: Tensor
    sampled: Tensor

    @property
    def trunk_slots(self) -> int:
        """K."""
        return self.nodes.shape[2] - self.nodes.shape[1]

    def visible(self) -> Tensor:
        """[P, L, L]: ``nodes`` below the trunk's own rows, which are causal."""
        p, length = self.source.shape
        trunk = torch.ones(self.trunk_slots, length, dtype=torch.bool, device=self.source.device)
        return torch.cat([trunk.tril().expand(p, -1, -1), self.nodes], dim=1)

    def to(self, device: torch.device) -> GroupTree:
        """The same layout with every tensor on ``device``."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return GroupTree(**moved)


def build_tree(
    prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor, *, align: int = 1
) -> GroupTree:
    """Lay out P groups in rows whose length is a multiple of ``align``.

    prompt_mask: [P, S] bool, True on real prompt tokens, padded on either side
    completion_ids: [P, G, T]; completion_mask: [P, G, T] bool, True on the first tokens of each

    The last token of a completion predicts nothing, so it is not part of the tree.
    """
    p, g, t = completion_ids.shape
    trunk = prompt_mask.sum(1)
    slots = int(trunk.max())
    fed = completion_mask.clone()
    fed[..., :-1] &= completion_mask[..., 1:]
    fed[..., -1] = False
    twin = _first_twin(completion_ids, fed)
    node = fed & (twin == torch.arange(g)[None, :, None])
    counts = node.sum((1, 2))
    count = -(-(slots + int(counts.max())) // align) * align - slots
    length = slots + count

    in_trunk = _kept_first(prompt_mask, slots)
    in_tree = _kept_first(node.view(p, g * t), count)
    node_slot = (slots - 1 + node.view(p, g * t).cumsum(1)).view(p, g, t).gather(1, twin)
    predictor = torch.cat([(trunk - 1)[:, None, None].expand(p, g, 1), node_slot[..., :-1]], dim=2)
    predictor = predictor + length * torch.arange(p)[:, None, None]
    sampled = completion_mask.flatten().nonzero()[:, 0]
    by_slot, order = predictor.flatten()[sampled].sort(stable=True)
    rows, row = torch.unique_consecutive(by_slot, return_inverse=True)
    return GroupTree(
        source=torch.cat([in_trunk, in_tree + prompt_mask.shape[1]], dim=1),
        real=torch.cat(
            [torch.arange(slots) < trunk[:, None], torch.arange(count) < counts[:, None]], dim=1
        ),
        nodes=_visible_to_nodes(trunk, node, node_slot, slots, count),
        rank=torch.cat([torch.arange(slots).expand(p, -1), trunk[:, None] + in_tree % t], dim=1),
        trunk=trunk,
        rows=rows,
        row=row,
        sampled=sampled[order],
    )


def _kept_first(keep: Tensor, slots: int) -> Tensor:
    """[P, slots]: the columns to keep, in order, then others as filler."""
    columns = torch.argsort(keep.to(torch.uint8), dim=1, descending=True, stable=True)[:, :slots]
    if columns.shape[1] < slots:
        columns = torch.nn.functional.pad(columns, (0, slots - columns.shape[1]))
    return columns


def _first_twin(ids: Tensor, fed: Tensor) -> Tensor:
    """[P, G, T]: the first completion of the group that has the same tokens up to and with t."""
    same = (ids[:, :, None] == ids[:, None]) & fed[:, :, None] & fed[:, None]
    return same.to(torch.uint8).cumprod(-1).argmax(2)


def _visible_to_nodes(
    trunk: Tensor, node: Tensor, node_slot: Tensor, slots: int, count: int
) -> Tensor:
    """[P, count, slots + count]: a node sees the trunk, its ancestors and itself."""
    p, _, t = node.shape
    visible = torch.zeros(p, count, slots + count, dtype=torch.bool)
    visible[:, :, :slots] = (torch.arange(slots) < trunk[:, None])[:, None]
    lineage = node[..., None] & torch.ones(t, t, dtype=torch.bool).tril()
    i, j, query, key = lineage.nonzero(as_tuple=True)
    visible[i, node_slot[i, j, query] - slots, node_slot[i, j, key]] = True
    return visible
