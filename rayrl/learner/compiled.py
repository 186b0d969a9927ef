"""torch.compile for the layers of a model, tried out before the run relies on it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch._dynamo import config as _config
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import AttentionInterface

from rayrl import windows
from rayrl.learner.attention import NAME, tree_attention
from rayrl.learner.forward import Forward
from rayrl.learner.last_layer import LastLayer
from rayrl.vlm import prompt_inputs

_OFF = "TORCHDYNAMO_DISABLE"
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
_KINDS = 32
"""How often a layer's code may be compiled: with and without gradient, of the inputs too, adapters
on and off, the last layer by itself, one prompt or many.  PyTorch's own limit of 8 is too low."""


def compile_layers(model: Any) -> None:
    """Compile what every layer of ``model`` computes, with sizes left open.

    What surrounds a layer stays outside: the hooks that gather its parameters where they are
    sharded, and the second run of a layer that recomputes (``recompute_layers``, called after
    this).  So does attention over the tree of a group, and in windows of pictures: their rows
    differ in every batch, and the kernels they call are compiled already.

    Raises ValueError where the compiler is turned off, in which case PyTorch would compile nothing
    and not say so, and for a model whose layers are not marked as such."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if os.environ.get(_OFF) == "1":
        raise ValueError(f"{_name(model)} does not compile: {_OFF}=1 turns the compiler off")
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{_name(model)} has no layers that are marked as such")
    for name, attention in ((NAME, tree_attention), (windows.NAME, windows.windowed_attention)):
        disabled = torch.compiler.disable(attention)  # type: ignore[no-untyped-call]
        AttentionInterface.register(name, disabled)
    for layer in layers:
        # What chooses the tokens that a last layer is asked for stays outside too.
        place = layer.forward if isinstance(layer.forward, LastLayer) else layer
        # Newer than what torch says of its types.
        limits: dict[str, Any] = {"recompile_limit": _KINDS}
        place.forward = torch.compile(place.forward, dynamic=True, **limits)


@contextmanager
def same_outputs(model: Any, processor: Any, forward: Forward, eos_id: int) -> Iterator[None]:
    """Run a small batch through ``model`` before and after its layers are compiled inside; where
    they are split over ranks, every rank must.

    Raises ValueError with the reason where a layer does not compile, needs to so often that PyTorch
    would leave it as it is, or computes something else than before."""
    want = _trial(model, processor, forward, eos_id)
    yield
    try:
        with _config.patch(fail_on_recompile_limit_hit=True):
            got = _trial(model, processor, forward, eos_id)
    except FailOnRecompileLimitHit as error:
        raise ValueError(
            f"{_name(model)} does not compile: its layers want more than {_KINDS} versions of the "
            "same code; TORCH_LOGS=recompiles says what differs between them"
        ) from error
    except (RuntimeError, AssertionError) as error:
        # What the compiler raises, where it finds no C++ compiler too, is a RuntimeError.
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ValueError(
            f"{_name(model)} does not compile: {type(error).__name__}: {reason}"
        ) from error
    difference = float((got - want).abs().max())
    if not difference <= _TOLERANCE[model.dtype]:
        raise ValueError(
            f"{_name(model)}: compiled log-probs differ by {difference:.3g} from plain ones"
        )


def _name(model: Any) -> str:
    return f"learner.compile: {type(model).__name__}"


def _trial(model: Any, processor: Any, forward: Forward, eos_id: int) -> torch.Tensor:
    """Log-probs [2, 2, 4] of meaningless captions, with and without gradient.

    There are other numbers of prompts and of nodes in it: what is equal in its first batch, the
    compiler takes for the same size for good, and compiles anew where it is not."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    inputs = prompt_inputs(processor, [picture.getvalue()] * 2, ["Describe the image."] * 2)
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    ids = torch.full((2, 2, 4), eos_id, device=model.device)
    with torch.no_grad():
        forward.plain(model, inputs, ids)
    logprobs = forward.plain(model, inputs, ids)
    logprobs.sum().backward()
    model.zero_grad(set_to_none=True)
    return logprobs.detach()
