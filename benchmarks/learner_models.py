"""Captioners of known shapes with random weights, for benchmarks of the learner.

``MODELS[name](tokens)`` gives a configuration of transformers for ``tokens`` image tokens and a
function from P to the image inputs of P prompts.  ``SMALL`` holds the same families with hardly any
width or depth: what runs on a GPU can be tried on a laptop through the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Idefics3Config, Qwen2_5_VLConfig

IMAGE = 5

Images = Callable[[int], dict[str, Tensor]]
Shape = Callable[[int], tuple[Any, Images]]


@dataclass(frozen=True, slots=True)
class Vision:
    """A vision tower."""

    width: int
    inner: int
    layers: int
    heads: int


@dataclass(frozen=True, slots=True)
class Text:
    """A llama-like decoder with tied embeddings."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


def idefics3(image: int, patch: int, shuffle: int, vision: Vision, text: Text) -> Idefics3Config:
    """``image`` pixels a side in patches of ``patch``, ``shuffle`` x ``shuffle`` to a token."""
    return Idefics3Config(
        image_token_id=IMAGE,
        scale_factor=shuffle,
        pad_token_id=0,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.inner,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": image,
            "patch_size": patch,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "intermediate_size": text.inner,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
    )


def tiny(patch: int, vision: Vision, text: Text) -> Shape:
    """One square picture as large as its tokens need, 2 x 2 patches to a token."""

    def build(tokens: int) -> tuple[Any, Images]:
        side = 2 * patch * round(tokens**0.5)
        config = idefics3(side, patch, 2, vision, text)
        return config, lambda p: {"pixel_values": torch.randn(p, 1, 3, side, side)}

    return build


def smolvlm(vision: Vision, text: Text) -> Shape:
    """512-pixel tiles of 64 tokens each."""

    def build(tokens: int) -> tuple[Any, Images]:
        tiles = max(1, tokens // 64)
        config = idefics3(512, 16, 4, vision, text)
        return config, lambda p: {"pixel_values": torch.randn(p, tiles, 3, 512, 512)}

    return build


def qwen(vision: Vision, text: Text) -> Shape:
    """Patches of 14 pixels in two frames, four to a token; every eighth layer of the tower sees
    the whole picture."""

    def build(tokens: int) -> tuple[Any, Images]:
        side = 2 * round(tokens**0.5)
        config = Qwen2_5_VLConfig(
            image_token_id=IMAGE,
            tie_word_embeddings=True,
            vision_config={
                "depth": vision.layers,
                "hidden_size": vision.width,
                "intermediate_size": vision.inner,
                "num_heads": vision.heads,
                "out_hidden_size": text.width,
                "fullatt_block_indexes": list(range(7, vision.layers, 8)),
            },
            text_config={
                "vocab_size": text.vocabulary,
                "hidden_size": text.width,
                "intermediate_size": text.inner,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "num_key_value_heads": text.kv_heads,
                "tie_word_embeddings": True,
                "rope_scaling": {
                    "type": "mrope",
                    "rope_type": "default",
                    "mrope_section": [16, 24, 24],
                },
            },
        )

        def images(p: int) -> dict[str, Tensor]:
            return {
                "pixel_values": torch.randn(p * side * side, 3 * 2 * 14 * 14),
                "image_grid_thw": torch.tensor([[1, side, side]] * p),
            }

        return config, images

    return build


MODELS: dict[str, Shape] = {
    # 16 tokens: 64 x 64 pixels
    "tiny-2.5m": tiny(8, Vision(128, 256, 3, 4), Text(192, 576, 4, 6, 6, 1024)),
    # 256 tokens: 128 x 128 pixels
    "tiny-1m": tiny(4, Vision(64, 128, 3, 2), Text(128, 384, 3, 4, 4, 1024)),
    "smolvlm-256m": smolvlm(Vision(768, 3072, 12, 12), Text(576, 1536, 30, 9, 3, 49280)),
    "smolvlm-500m": smolvlm(Vision(768, 3072, 12, 12), Text(960, 2560, 32, 15, 5, 49280)),
    "qwen2.5-vl-3b": qwen(Vision(1280, 3420, 32, 16), Text(2048, 11008, 36, 16, 2, 151936)),
}
_SMALL_SMOLVLM = smolvlm(Vision(64, 128, 1, 2), Text(128, 256, 2, 2, 1, 512))
SMALL: dict[str, Shape] = MODELS | {
    "smolvlm-256m": _SMALL_SMOLVLM,
    "smolvlm-500m": _SMALL_SMOLVLM,
    "qwen2.5-vl-3b": qwen(Vision(64, 128, 8, 2), Text(256, 512, 2, 2, 1, 512)),
}
