"""Attention of vision towers that pack several pictures, or windows of them, into one sequence.

Each attends to itself alone.  For kernels that take the boundaries transformers hands them over;
with PyTorch's it calls one for each window, which are thousands for a batch of Qwen2.5-VL.  Here
those that are equally long go through one call.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "rayrl_windows_flash"
"""transformers hands boundaries over to what calls itself "flash"."""
_LAYOUT = "rayrl_layout"


class _Layout(NamedTuple):
    """Windows in the order of their lengths: ``order`` [N] of the tokens and its inverse, None
    where they lie so already; (windows, length) of each length."""

    order: Tensor | None
    inverse: Tensor | None
    shapes: list[tuple[int, int]]


def windowed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention output [1, N, heads, D] of queries [1, heads, N, D] in windows between the
    boundaries ``cu_seq_lens_q`` (from 0 to N); each token attends to all of its window."""
    layout = _layout(cu_seq_lens_q)
    given = [each[0] for each in (query, key, value)]
    if layout.order is not None:
        given = [each.index_select(1, layout.order) for each in given]
    sizes = [windows * length for windows, length in layout.shapes]
    outputs = []
    for shape, *parts in zip(layout.shapes, *(each.split(sizes, 1) for each in given), strict=True):
        q, k, v = (part.unflatten(1, shape).transpose(0, 1) for part in parts)
        output = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output = torch.cat(outputs)
    if layout.inverse is not None:
        output = output.index_select(0, layout.inverse)
    return output[None], None


def _layout(boundaries: Tensor) -> _Layout:
    """Made once: a tower gives the same boundaries to many layers, and to read them it waits for a
    GPU."""
    known: _Layout | None = getattr(boundaries, _LAYOUT, None)
    if known is not None:
        return known
    ends = boundaries.cpu()
    lengths, starts = ends.diff(), ends[:-1]
    shapes, places = [], []
    for length in lengths.unique().tolist():
        mine = starts[lengths == length]
        shapes.append((len(mine), length))
        places.append((mine[:, None] + torch.arange(length)).flatten())
    order = torch.cat(places)
    layout = _Layout(None, None, shapes)
    if not torch.equal(order, torch.arange(len(order))):
        layout = _Layout(order.to(boundaries.device), order.argsort().to(boundaries.device), shapes)
    setattr(boundaries, _LAYOUT, layout)
    return layout


def use_windowed_attention(model: torch.nn.Module) -> None:
    """Switch whatever of a model attends between boundaries from ``sdpa`` to this."""
    for module in model.modules():
        config = getattr(module, "config", None)
        takes_boundaries = "cu_seqlens" in inspect.signature(type(module).forward).parameters
        if takes_boundaries and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME  # type: ignore[union-attr]


AttentionInterface.register(NAME, windowed_attention)
