"""Useful floating-point operations of an update, counted from the model's shape.

Every image goes through the vision tower once, every prompt and every caption token through the
language model once; of a prompt's tokens but its last one, whose states nobody reads, the last
layer makes keys and values alone.  A multiplication with a matrix of n weights is 2n operations a
token, and the backward pass costs as much again for the inputs and for the weights that train.
What an implementation does on top (copies of the prompt, recomputed activations) is not useful
work, so that utilisation falls with it.  Embeddings, norms and activations are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrl.learner.families import FAMILIES, Inputs, bare_model
from rayrl.learner.last_layer import unread_weights
from rayrl.parts import part_of

_MATRICES = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
_ORDER = ("vision", "connector", "language")


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one forward pass through a part: in ``matrices`` and in ``attention``."""

    matrices: float
    attention: float


class FlopCounter:
    """Counts for one model; which of its parameters train is read when this is made."""

    def __init__(self, model: Any) -> None:
        bare = bare_model(model)
        config = bare.config
        self._head = int(bare.get_output_embeddings().weight.numel())
        self._weights = dict.fromkeys(_ORDER, 0)
        training = dict.fromkeys(_ORDER, 0)
        for name, module in bare.named_modules():
            if isinstance(module, _MATRICES):
                part, size = part_of(f"{name}.weight"), module.weight.numel()
                self._weights[part] += size
                training[part] += size * module.weight.requires_grad
        self._factors = _backward_factors(bare, self._weights, training)
        self._weights["language"] -= self._head  # counted by the tokens that it predicts
        family = FAMILIES.get(config.model_type)
        self._unread = unread_weights(family.decoder(bare)) if family else 0
        self._text = _attention_shape(config.get_text_config())
        self._vision = _attention_shape(getattr(config, "vision_config", None))
        self._patch = int(getattr(getattr(config, "vision_config", None), "patch_size", 1))
        self._window, self._windowed = _windows(getattr(config, "vision_config", None))
        self._image_id = getattr(config, "image_token_id", None)

    def count(self, inputs: Inputs, mask: Tensor, *, backward: bool, encoded: float = 1.0) -> float:
        """Operations for P prompts with the completions of ``mask`` [P, G, T]; ``encoded`` is the
        share of the images that ran through the vision tower (the others' features were kept)."""
        work = self.forward(inputs, mask)
        total = 0.0
        for part, cost in work.items():
            matrices, attention = self._factors[part] if backward else (1.0, 1.0)
            share = 1.0 if part == "language" else encoded
            total += share * (matrices * cost.matrices + attention * cost.attention)
        return total

    def forward(self, inputs: Inputs, mask: Tensor) -> Mapping[str, Work]:
        """Operations of one forward pass by part."""
        prompts = inputs["attention_mask"].sum(1).double().cpu()
        lengths = mask.sum(-1).double().cpu()
        layers, width = self._text
        # A prompt token sees half of the prompt on average, a caption token all of it.
        seen = (lengths * (prompts[:, None] + lengths / 2)).sum() * layers
        seen += (prompts**2).sum() / 2 * (layers - bool(self._unread))
        tokens = float(prompts.sum() + lengths.sum())
        unread = float(prompts.sum()) - len(prompts)
        head = 2.0 * self._head * float(lengths.sum())
        images, patches = self._patches(inputs)
        image_tokens = float((inputs["input_ids"] == self._image_id).sum())
        depth, breadth = self._vision
        far, near = depth - self._windowed, self._windowed
        seen_patches = far * patches + near * min(patches, self._window)
        return {
            "vision": Work(
                2.0 * self._weights["vision"] * images * patches,
                4.0 * breadth * images * patches * seen_patches,
            ),
            "connector": Work(2.0 * self._weights["connector"] * image_tokens, 0.0),
            "language": Work(
                2.0 * (self._weights["language"] * tokens - self._unread * unread) + head,
                4.0 * width * float(seen),
            ),
        }

    def _patches(self, inputs: Inputs) -> tuple[int, float]:
        """Images, and patches an image: from pixels [..., C, H, W], or one patch a row."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return 0, 0.0
        if pixels.ndim == 2:
            images = len(inputs["image_grid_thw"])
            return images, len(pixels) / images
        *rows, _, height, width = pixels.shape
        images = math.prod(rows)
        if len(rows) > 1:
            # Tiles of nothing but zeros fill a prompt up to the most that one has; no tower sees
            # them.
            images = int((pixels != 0).flatten(2).any(2).sum())
        return images, height * width / self._patch**2

    def share(self, inputs: Inputs, rows: Sequence[int]) -> float:
        """That of the batch's image tokens which these prompts have."""
        tokens = (inputs["input_ids"] == self._image_id).sum(1).double().cpu()
        return float(tokens[list(rows)].sum() / tokens.sum().clamp(min=1.0))


def _backward_factors(
    model: torch.nn.Module, weights: Mapping[str, int], training: Mapping[str, int]
) -> dict[str, tuple[float, float]]:
    """For every part, what a forward and backward pass cost in forward passes, for matrices and
    for attention: gradients of the inputs where anything up to here trains, those of the weights
    for the share of them that train."""
    moves = dict.fromkeys(_ORDER, False)
    for name, parameter in model.named_parameters():
        moves[part_of(name)] |= parameter.requires_grad
    factors, upstream = {}, False
    for part in _ORDER:
        upstream = upstream or moves[part]
        share = training[part] / weights[part] if weights[part] else 0.0
        factors[part] = (1.0 + upstream + share, 1.0 + 2.0 * upstream)
    return factors


def _windows(vision: Any) -> tuple[int, int]:
    """Patches of a window, and how many layers attend within windows alone (Qwen2.5-VL's)."""
    far, size = (getattr(vision, name, None) for name in ("fullatt_block_indexes", "window_size"))
    if far is None or not size:
        return 0, 0
    return (size // vision.patch_size) ** 2, _attention_shape(vision)[0] - len(far)


def _attention_shape(config: Any) -> tuple[int, int]:
    """Layers, and the width of all heads together."""
    if config is None:
        return 0, 0
    layers: Any = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", 0)
    heads: Any = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 1)
    size: Any = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(layers), int(heads * size)
