"""Activation checkpointing: layers keep their inputs alone and run again in the backward pass
(arXiv 1604.06174).

The model stays in evaluation mode, unlike with the switch that transformers offers, which wants
training mode and with it dropout.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import checkpoint


def recompute_layers(model: Any) -> int:
    """Make every layer through which gradients can flow recompute its activations; returns how
    many.  Values and gradients stay as they are.

    Raises ValueError for a model whose layers are not marked as able to."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"learner.activation_checkpointing: {type(model).__name__} has no layers that "
            "recompute; lower learner.micro_batch_images instead"
        )
    for layer in layers:
        # Without gradient (a frozen vision tower) this runs the layer and keeps nothing.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return len(layers)
