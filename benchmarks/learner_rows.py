"""What bench_learner.py measures: models, image tokens, group sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model, one number of image tokens, one group size.  ``prompts`` is at most P;
    ``plain`` measures transformers as it is, too."""

    model: str
    image_tokens: int
    group_size: int
    prompts: int = 4
    dtype: str = "float32"
    frozen_vision: bool = False
    gpu: bool = False
    plain: bool = False


SHAPES = [
    Row(
        model=model,
        image_tokens=tokens,
        group_size=group,
        prompts=8,  # a step of bench_against_trl.py
        frozen_vision=frozen,
        plain=True,
    )
    for model, tokens in (("tiny-2.5m", 16), ("tiny-1m", 256))
    for group in (8, 16)
    for frozen in (False, True)
]
GRID = [
    Row(model="tiny-2.5m", image_tokens=tokens, group_size=group)
    for tokens in (16, 64, 256, 1024)
    for group in (4, 8, 16, 32)
]
GPU = [
    Row(
        model=model,
        image_tokens=tokens,
        group_size=16,
        prompts=8,
        dtype="bfloat16",
        frozen_vision=frozen,
        gpu=True,
        plain=True,
    )
    for model, sizes in (
        ("smolvlm-256m", (64, 1024)),
        ("smolvlm-500m", (64, 1024)),
        ("qwen2.5-vl-3b", (256, 1024)),
    )
    for tokens in sizes
    for frozen in (False, True)
]
SUITES = {"shapes": SHAPES, "grid": GRID, "gpu": GPU}
