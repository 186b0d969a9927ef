"""torch.compile for the layers of a model, tried out before the run relies on it."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from transformers import AttentionInterface

from rayrl.learner.attention import NAME, tree_attention
from rayrl.learner.forward import Forward
from rayrl.vlm import prompt_inputs

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


def compile_layers(model: Any, processor: Any, forward: Forward, eos_id: int) -> None:
    """Compile every layer of ``model`` and run a small batch through it, forwards and backwards.

    Attention over the tree of a group stays as it is: its rows differ in every batch, and the
    kernels it calls are compiled already.

    Raises ValueError with the reason where a layer does not compile, or computes something else
    than before.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    name = f"learner.compile: {type(model).__name__}"
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{name} has no layers that are marked as such")
    want = _trial(model, processor, forward, eos_id)
    disabled = torch.compiler.disable(tree_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, disabled)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        got = _trial(model, processor, forward, eos_id)
    except (RuntimeError, AssertionError) as error:
        # What the compiler raises, where it finds no C++ compiler too, is a RuntimeError.
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ValueError(f"{name} does not compile: {type(error).__name__}: {reason}") from error
    difference = float((got - want).abs().max())
    if not difference <= _TOLERANCE[model.dtype]:
        raise ValueError(f"{name}: compiled log-probs differ by {difference:.3g} from plain ones")


def _trial(model: Any, processor: Any, forward: Forward, eos_id: int) -> torch.Tensor:
    """Log-probs [2, 2, 3] of meaningless captions, with and without gradient."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    inputs = prompt_inputs(processor, [picture.getvalue()] * 2, ["Describe the image."] * 2)
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    ids = torch.full((2, 2, 3), eos_id, device=model.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        forward.compute(model, inputs, ids, mask)
    logprobs = forward.compute(model, inputs, ids, mask).logprobs
    logprobs.sum().backward()
    model.zero_grad(set_to_none=True)
    return logprobs.detach()
