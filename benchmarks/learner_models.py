"""Captioners of known shapes with random weights, for benchmarks of the learner.

Each entry of ``MODELS`` takes the number of image tokens and gives a configuration of transformers
and a function from P to the image inputs of P prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Idefics3Config, Qwen2_5_VLConfig

IMAGE = 5

Images = Callable[[int], dict[str, Tensor]]
Shape = Callable[[int], tuple[Any, Images]]


def idefics3(image: int, patch: int, scale: int, vision: tuple, text: tuple) -> Idefics3Config:
    width, inner, layers, heads = vision
    t_width, t_inner, t_layers, t_heads, t_kv, vocabulary = text
    return Idefics3Config(
        image_token_id=IMAGE,
        scale_factor=scale,
        pad_token_id=0,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image,
            "patch_size": patch,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": t_width,
            "intermediate_size": t_inner,
            "num_hidden_layers": t_layers,
            "num_attention_heads": t_heads,
            "num_key_value_heads": t_kv,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
    )


def tiny(tokens: int) -> tuple[Any, Images]:
    """2.5 M parameters; one square picture of 8-pixel patches, four to a token."""
    side = 16 * round(tokens**0.5)
    config = idefics3(side, 8, 2, (128, 256, 3, 4), (192, 576, 4, 6, 6, 1024))
    return config, lambda p: {"pixel_values": torch.randn(p, 1, 3, side, side)}


def smolvlm(text: tuple) -> Shape:
    """512-pixel tiles of 64 tokens each."""

    def build(tokens: int) -> tuple[Any, Images]:
        tiles = max(1, tokens // 64)
        config = idefics3(512, 16, 4, (768, 3072, 12, 12), text)
        return config, lambda p: {"pixel_values": torch.randn(p, tiles, 3, 512, 512)}

    return build


def qwen_3b(tokens: int) -> tuple[Any, Images]:
    """Patches of 14 pixels in two frames, four to a token."""
    side = 2 * round(tokens**0.5)
    config = Qwen2_5_VLConfig(
        image_token_id=IMAGE,
        tie_word_embeddings=True,
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
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


MODELS: dict[str, Shape] = {
    "tiny-2.5m": tiny,
    "smolvlm-256m": smolvlm((576, 1536, 30, 9, 3, 49280)),
    "smolvlm-500m": smolvlm((960, 2560, 32, 15, 5, 49280)),
    "qwen2.5-vl-3b": qwen_3b,
}
