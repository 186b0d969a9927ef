"""A tiny random model of every family, with a batch for it."""

from __future__ import annotations

import torch
import transformers
from torch.nn.functional import pad

PAD, EOS, IMAGE, VOCABULARY = 0, 2, 3, 50
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "initializer_range": 0.02,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def idefics3(name="Idefics3"):
    return getattr(transformers, f"{name}Config")(
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        vision_config={**VISION, "image_size": 64},
        text_config={**TEXT, "model_type": "llama"},
    )


def llava():
    return transformers.LlavaConfig(
        image_token_index=IMAGE,
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama"},
        vision_feature_layer=-1,
    )


def paligemma(text, **options):
    return transformers.PaliGemmaConfig(
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32},
        text_config={**TEXT, "model_type": text, "head_dim": 16, **options},
    )


def blip2(text):
    parts = {
        "opt": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        "qwen2": TEXT,
        "gemma2": {**TEXT, "head_dim": 16, "final_logit_softcapping": 5.0},
    }
    return transformers.Blip2Config(
        image_token_index=IMAGE,
        num_query_tokens=4,
        vision_config=VISION,
        qformer_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
            "vocab_size": VOCABULARY,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={**parts[text], "model_type": text},
    )


def qwen2_5_vl():
    return transformers.Qwen2_5_VLConfig(
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=5,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config={**TEXT, "rope_scaling": ROPE},
    )


def qwen3_vl():
    return transformers.Qwen3VLConfig(
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=5,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**TEXT, "head_dim": 16, "rope_scaling": ROPE},
    )


def fixed_images(count, side):
    return {"pixel_values": torch.randn(count, 3, side, side)}, [(side // 16) ** 2] * count


def idefics_images(count):
    return {"pixel_values": torch.randn(count, 1, 3, 64, 64)}, [4] * count


def tiled_images(count):
    """Pictures of one, three and two tiles, filled up with tiles of zeros as the processor does;
    the last tile of each is narrower than the others."""
    tiles = torch.tensor([1, 3, 2])[:count]
    there = torch.arange(3) < tiles[:, None]
    seen = there[:, :, None, None].expand(-1, -1, 64, 64).clone()
    seen[torch.arange(count), tiles - 1, :, 32:] = False
    pixels = torch.randn(count, 3, 3, 64, 64) * seen[:, :, None]
    return {"pixel_values": pixels, "pixel_attention_mask": seen}, (4 * tiles).tolist()


def grid_images(count):
    """Images of different sizes: patches [sum, 3 * 2 * 4 * 4], four patches to a token."""
    grid = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 6, 4]])[:count]
    sizes = grid.prod(-1)
    pixels = torch.randn(int(sizes.sum()), 3 * 2 * 4 * 4)
    return {"pixel_values": pixels, "image_grid_thw": grid}, (sizes // 4).tolist()


CASES = {
    "idefics3": (idefics3, idefics_images),
    "smolvlm": (lambda: idefics3("SmolVLM"), idefics_images),
    "smolvlm tiles": (lambda: idefics3("SmolVLM"), tiled_images),
    "llava": (llava, lambda count: fixed_images(count, 32)),
    "paligemma": (lambda: paligemma("gemma"), lambda count: fixed_images(count, 32)),
    "paligemma2": (lambda: paligemma("gemma2"), lambda count: fixed_images(count, 32)),
    "paligemma2 window": (
        lambda: paligemma("gemma2", sliding_window=4),
        lambda count: fixed_images(count, 32),
    ),
    "blip-2 opt": (lambda: blip2("opt"), lambda count: fixed_images(count, 32)),
    "blip-2 qwen": (lambda: blip2("qwen2"), lambda count: fixed_images(count, 32)),
    "blip-2 softcap": (lambda: blip2("gemma2"), lambda count: fixed_images(count, 32)),
    "qwen2.5-vl": (qwen2_5_vl, grid_images),
    "qwen3-vl": (qwen3_vl, grid_images),
}


def build(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query_tokens" in name:  # zeros by default
                parameter.normal_()
            elif parameter.ndim > 1:  # far from the near-constant function that it starts as
                parameter.mul_(4.0)
        model.get_output_embeddings().weight.mul_(2.0)
    return model


def make_batch(case, text_lengths=(5, 3, 7), side="left"):
    """Three prompts of unequal lengths with one image each, and groups of three completions."""
    torch.manual_seed(1)
    count = len(text_lengths)
    images, sizes = CASES[case][1](count)
    rows = []
    for size, length in zip(sizes, text_lengths, strict=True):
        text = torch.randint(6, VOCABULARY, (length,))
        rows.append(torch.cat([torch.tensor([1]), torch.full((size,), IMAGE), text]))
    widest = max(map(len, rows))
    gaps = [(widest - len(row), 0) if side == "left" else (0, widest - len(row)) for row in rows]
    prompts = {
        "input_ids": torch.stack([pad(r, gap) for r, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.stack(
            [pad(torch.ones_like(r), gap) for r, gap in zip(rows, gaps, strict=True)]
        ),
        **images,
    }
    if case.startswith("paligemma"):
        prompts["token_type_ids"] = torch.zeros_like(prompts["input_ids"])
    if case.startswith("qwen"):
        prompts["mm_token_type_ids"] = (prompts["input_ids"] == IMAGE).long()
    ids = torch.randint(6, VOCABULARY, (count, 3, 5))
    ids[:, 1, :2] = ids[:, 0, :2]
    lengths = torch.tensor([[5, 4, 1], [3, 5, 5], [2, 2, 4]])[:count]
    return prompts, ids, torch.arange(5) < lengths[..., None]


def gradients(model, output):
    model.zero_grad()
    torch.manual_seed(2)
    loss = (output.logprobs * torch.randn(output.logprobs.shape)).sum()
    (loss + output.entropy.sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
