"""What differs between families of vision-language models, as a table.

All of them embed the prompt's token ids, put image features in the place of image placeholders,
and run a decoder.  A family says which inputs its vision tower takes, how positions count, and
whether the prompt attends in both directions; the rest is the same code for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rayrl.learner.attention import NAME as TREE_ATTENTION

Inputs = Mapping[str, Any]


def running_positions(model: Any, inputs: Inputs) -> Tensor:
    """[P, S]: real tokens counted from 0, whichever side is padded."""
    return (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)


def one_based_positions(model: Any, inputs: Inputs) -> Tensor:
    """[P, S]: real tokens counted from 1."""
    return running_positions(model, inputs) + 1


def grid_positions(model: Any, inputs: Inputs) -> Tensor:
    """[3, P, S]: time, height and width of every token (multi-axis rotary positions,
    arXiv 2409.12191), as the model itself computes them: in dozens of small operations and with
    values that it reads, so on the CPU, wherever the inputs are."""
    if inputs.get("mm_token_type_ids") is None:
        raise ValueError(
            f"{type(model).__name__}: prompt_inputs lack mm_token_type_ids, "
            f"got {sorted(inputs)}; positions cannot be computed without them"
        )
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{name: inputs[name].cpu() for name in names})
    moved: Tensor = positions.to(inputs["input_ids"].device)
    return moved


def _model_decoder(model: Any) -> Any:
    return getattr(model.model, "text_model", None) or model.model.language_model


def _language_model_decoder(model: Any) -> Any:
    return model.language_model.model


def _take_rows(inputs: Inputs, names: Sequence[str], prompts: Sequence[int]) -> dict[str, Tensor]:
    """The image inputs of the given prompts, in that order, one may be named many times."""
    return {
        name: inputs[name][_image_rows(inputs, name, prompts)]
        for name in names
        if inputs.get(name) is not None
    }


def _take_patches(
    inputs: Inputs, names: Sequence[str], prompts: Sequence[int]
) -> dict[str, Tensor]:
    """As ``_take_rows`` where pixel_values [sum of patches, .] concatenates the images."""
    grid = inputs["image_grid_thw"]
    patches = inputs["pixel_values"].split(grid.prod(-1).tolist())
    rows = _image_rows(inputs, "image_grid_thw", prompts)
    return {"pixel_values": torch.cat([patches[i] for i in rows]), "image_grid_thw": grid[rows]}


def _image_rows(inputs: Inputs, name: str, prompts: Sequence[int]) -> list[int]:
    """Rows of an image input that belong to the given prompts, all with equally many images."""
    p, images = len(inputs["input_ids"]), len(inputs[name])
    if images % p:
        raise ValueError(f"{name}: {images} images for {p} prompts, want equally many for each")
    each = images // p
    return [prompt * each + i for prompt in prompts for i in range(each)]


def _no_softcap(model: Any) -> float | None:
    return None


def _language_model_softcap(model: Any) -> float | None:
    return getattr(model.config.text_config, "final_logit_softcapping", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table.

    image_inputs: the inputs of ``get_image_features`` that a processor produces
    decoder: the decoder stack (embeddings in, hidden states out)
    positions: the prompt's positions [P, S] or [3, P, S]
    token_types: the input that is 0 on tokens that attend in both directions, if any
    deepstack: image features also enter the first decoder layers (arXiv 2406.04334)
    softcap: the cap on logits, where the model applies one
    take_images: the image inputs of some of the prompts
    """

    image_inputs: tuple[str, ...] = ("pixel_values",)
    decoder: Callable[[Any], Any] = _model_decoder
    positions: Callable[[Any, Inputs], Tensor] = running_positions
    token_types: str | None = None
    deepstack: bool = False
    softcap: Callable[[Any], float | None] = _no_softcap
    take_images: Callable[[Inputs, Sequence[str], Sequence[int]], dict[str, Tensor]] = _take_rows


def _take_own(inputs: Inputs, names: Sequence[str], prompts: Sequence[int]) -> dict[str, Tensor]:
    """As ``_take_rows`` where nothing says which rows are whose."""
    p, rows = len(inputs["input_ids"]), inputs.get("pixel_values")
    if rows is not None and p > 1 and len(rows) != p:
        raise ValueError(
            f"pixel_values: {len(rows)} rows for {p} prompts, and nothing says which are whose in "
            "this family of models; want one row each, or one prompt at a time "
            "(learner.micro_batch_images 1)"
        )
    return _take_rows(inputs, names, prompts)


_IDEFICS3 = Family(image_inputs=("pixel_values", "pixel_attention_mask"))
_QWEN = Family(
    image_inputs=("pixel_values", "image_grid_thw"),
    positions=grid_positions,
    take_images=_take_patches,
)

FAMILIES: dict[str, Family] = {
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "llava": Family(image_inputs=("pixel_values", "image_sizes")),
    "paligemma": Family(positions=one_based_positions, token_types="token_type_ids"),
    "blip-2": Family(decoder=_language_model_decoder, softcap=_language_model_softcap),
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": replace(_QWEN, deepstack=True),
}


_UNKNOWN = Family(take_images=_take_own)
_UNKNOWN_GRID = Family(image_inputs=_QWEN.image_inputs, take_images=_take_patches)


def family_of(model: Any, inputs: Inputs) -> Family:
    """The row of a bare model; of one that is not in the table what its inputs tell."""
    unknown = _UNKNOWN if inputs.get("image_grid_thw") is None else _UNKNOWN_GRID
    return FAMILIES.get(model.config.model_type, unknown)


def bare_model(model: Any) -> Any:
    """The model inside an adapter wrapper (PEFT), which runs the same modules."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def refusal(model: Any) -> str | None:
    """Why the prefix of ``model`` (bare) cannot be shared, or None when it can."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"model type {kind!r} is not one of {', '.join(FAMILIES)}"
    text = model.config.get_text_config()
    attention = FAMILIES[kind].decoder(model).config._attn_implementation
    if attention not in ("sdpa", "eager", TREE_ATTENTION):
        return (
            f"attention {attention!r} takes no tree mask; "
            "load the model with attn_implementation='sdpa'"
        )
    strange = set(getattr(text, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if strange:
        return f"its text part has layers of type {', '.join(sorted(strange))}"
    if type(model.get_output_embeddings()) is not torch.nn.Linear:
        return f"its output head is a {type(model.get_output_embeddings()).__name__}"
    return None


def placeholder_counts(model: Any, inputs: Inputs) -> list[int]:
    """How many image features each prompt wants."""
    counts: list[int] = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    return counts


def encode_images(model: Any, inputs: Inputs) -> list[Tensor]:
    """Image features of every prompt, [1, n, D] for its n placeholder ids, or [1 + K, n, D] where
    the features of K vision layers enter the decoder as well (deepstack).

    Raises ValueError naming the prompt row whose placeholders and features differ in number."""
    family = FAMILIES[model.config.model_type]
    given = {name: inputs[name] for name in family.image_inputs if inputs.get(name) is not None}
    if "pixel_values" not in given:
        raise ValueError(f"{type(model).__name__}: prompt_inputs lack pixel_values")
    wanted = placeholder_counts(model, inputs)
    output = model.get_image_features(**given, return_dict=True)
    layers = [output.pooler_output, *(output.deepstack_features if family.deepstack else ())]
    images = [torch.stack(image) for image in zip(*layers, strict=True)]
    return _by_prompt(images, wanted, model.config.image_token_id)


def _by_prompt(images: list[Tensor], wanted: Sequence[int], image_id: int) -> list[Tensor]:
    """Consecutive images joined to ``wanted[p]`` features for prompt p."""
    left = list(images)
    prompts = []
    for p, count in enumerate(wanted):
        own = [left[0][:, :0]] if left else []
        while left and sum(image.shape[1] for image in own) < count:
            own.append(left.pop(0))
        features = sum(image.shape[1] for image in own)
        if features != count:
            raise ValueError(
                f"prompt row {p}: {count} image placeholder ids (id {image_id}) "
                f"for {features} image features"
            )
        prompts.append(torch.cat(own, dim=1))
    if left:
        raise ValueError(
            f"prompt row {len(wanted) - 1}: {sum(image.shape[1] for image in left)} image features "
            "are left over after the last placeholder id"
        )
    return prompts
