"""Log-probs of a group's completions, the prompt and its image computed once.

A prompt is 20 to 1,000 image tokens and a caption 10 to 20, yet the usual way runs G full copies
of both.  Here each prompt and its G completions are one row, laid out as a tree (``tree.py``) in
which a token attends to its own ancestors only, so that one forward pass over P rows gives the
same log-probs and, gradients flowing through the shared keys and values, the same gradients.
``naive_logprobs`` is the usual way, and the oracle.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayrl.learner.attention import mark_branches, use_tree_attention
from rayrl.learner.chunked import CHUNK_BYTES, Sampling
from rayrl.learner.families import (
    FAMILIES,
    Family,
    Inputs,
    bare_model,
    encode_images,
    placeholder_counts,
    refusal,
)
from rayrl.learner.last_layer import mark_read, read_in_last_layer
from rayrl.learner.naive import (
    LogprobOutput,
    check,
    naive_logprobs,
    naive_outputs,
)
from rayrl.learner.states import TokenStates
from rayrl.learner.tree import GroupTree, build_tree

__all__ = [
    "LogprobOutput",
    "decode_rows",
    "naive_logprobs",
    "naive_outputs",
    "prefix_shared_logprobs",
    "prefix_shared_outputs",
]


def prefix_shared_logprobs(
    model: Any,
    prompt_inputs: Inputs,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """Log-probs [P, G, T] of P groups of completions, each image and prompt computed once.

    prompt_inputs: the processor's output for P prompts: input_ids [P, S] with one placeholder id
        per image feature, attention_mask [P, S] (padded on either side), pixel_values, ...
    completion_ids: [P, G, T]; completion_mask: [P, G, T], True on the sampled tokens, which come
        first in each completion
    temperature, banned_ids: as the tokens were sampled: logits are divided by the temperature and
        those of banned ids are -inf

    Returns float32, in nats, with gradients to the model's parameters; 0 where the mask is False.

    A model that cannot share the prefix is computed by ``naive_logprobs``, with a warning.  A
    decoder that attends by ``sdpa`` is switched to the attention ``rayrl_tree`` for good, with
    which it computes what it did before.

    Raises ValueError where the inputs do not fit together or ids are outside the vocabulary, naming
    the prompt row.
    """
    return prefix_shared_outputs(
        model, prompt_inputs, completion_ids, completion_mask, temperature, banned_ids
    ).logprobs


def prefix_shared_outputs(
    model: Any,
    prompt_inputs: Inputs,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    *,
    with_entropy: bool = False,
    with_states: bool = False,
    image_features: Sequence[Tensor] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> LogprobOutput:
    """``prefix_shared_logprobs`` with more to choose.

    with_entropy: also the entropy of every token's distribution
    with_states: also the hidden states that predict the tokens
    image_features: what ``encode_images`` or a ``FeatureCache`` gave for these prompts; the vision
        tower does not run
    chunk_bytes: bound on the logits in memory
    """
    bare = bare_model(model)
    ids, mask = check(bare, prompt_inputs, completion_ids, completion_mask, temperature, banned_ids)
    reason = refusal(bare)
    if reason is not None:
        _warn_once(type(bare).__name__, reason, ids.shape[1])
        return naive_outputs(
            model,
            prompt_inputs,
            completion_ids,
            completion_mask,
            temperature,
            banned_ids,
            with_entropy=with_entropy,
            with_states=with_states,
        )
    device = prompt_inputs["input_ids"].device
    prompt_mask = prompt_inputs["attention_mask"].cpu().bool()
    # Fused kernels on CUDA want the mask's rows aligned, and else copy it in every layer.
    tree = build_tree(prompt_mask, ids, mask, align=8 if device.type == "cuda" else 1).to(device)
    ids = ids.to(device)
    # Before a GPU has the vision tower to run, for which they would wait.
    positions = FAMILIES[bare.config.model_type].positions(bare, prompt_inputs)
    features = _features(bare, prompt_inputs, image_features)
    states = TokenStates(
        hidden=decode_rows(bare, prompt_inputs, ids, tree, features, positions),
        row=tree.row,
        sampled=tree.sampled,
        ids=ids,
        head=bare.get_output_embeddings(),
        sampling=Sampling(
            temperature=temperature,
            banned=tuple(banned_ids),
            softcap=FAMILIES[bare.config.model_type].softcap(bare),
        ),
    )
    logprobs, entropy = states.logprobs(with_entropy=with_entropy, chunk_bytes=chunk_bytes)
    return LogprobOutput(logprobs, entropy, states if with_states else None)


def _features(model: Any, inputs: Inputs, given: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The image features that were given, if they fit the prompts, or freshly computed ones."""
    if given is None:
        return encode_images(model, inputs)
    wanted, counts = placeholder_counts(model, inputs), [part.shape[1] for part in given]
    if wanted != counts:
        raise ValueError(f"image features for {counts} placeholder ids, prompts have {wanted}")
    return given


def decode_rows(
    model: Any,
    inputs: Inputs,
    ids: Tensor,
    tree: GroupTree,
    features: Sequence[Tensor],
    positions: Tensor,
    cache: Any = None,
) -> Tensor:
    """Hidden states [N, D] of the slots of a bare model's packed rows that predict a token
    (``tree.rows``); keys and values of all slots go to ``cache``, where one is given.

    positions: the prompts' own, of ``Family.positions``"""
    family = FAMILIES[model.config.model_type]
    packed = torch.cat([inputs["input_ids"], ids.flatten(1)], dim=1).gather(1, tree.source)
    at_image = tree.real & (packed == model.config.image_token_id)
    # The placeholder's id may lie outside the embedding table, and filler's id means nothing.
    embeds = model.get_input_embeddings()(packed.masked_fill(~tree.real | at_image, 0))
    images = torch.cat(list(features), dim=1).to(embeds.device, embeds.dtype)
    embeds = embeds.masked_scatter(at_image[..., None], images[0])
    deepstack = {}
    if family.deepstack:
        deepstack = {"visual_pos_masks": at_image, "deepstack_visual_embeds": list(images[1:])}
    # A cache wants the last layer's keys and values of all slots, and features that enter there
    # find their own.
    everything = cache is not None or len(images) > model.config.get_text_config().num_hidden_layers
    output = family.decoder(model)(
        inputs_embeds=embeds,
        attention_mask=_masks(model, inputs, tree, embeds, everything=everything),
        position_ids=_positions(positions, inputs["attention_mask"], tree),
        past_key_values=cache,
        use_cache=cache is not None,
        **deepstack,
    )
    return _predicting(output.last_hidden_state, tree)


def _predicting(hidden: Tensor, tree: GroupTree) -> Tensor:
    """[N, D] of ``tree.rows`` from the states [P, L, D] of all slots, or from those [P, 1 + n, D]
    of each prompt's last token and the nodes."""
    rows, length = tree.rows, tree.source.shape[1]
    if hidden.shape[1] < length:
        slot = (rows % length - tree.trunk_slots + 1).clamp(min=0)
        rows = rows // length * hidden.shape[1] + slot
    return hidden.flatten(0, 1).index_select(0, rows)


def _positions(prompt: Tensor, prompt_mask: Tensor, tree: GroupTree) -> Tensor:
    """[P, L] or [3, P, L]: the prompt's own positions, then counting on from the largest."""
    following = prompt.masked_fill(prompt_mask == 0, -1).amax(-1, keepdim=True) + 1
    column = tree.source.clamp(max=prompt.shape[-1] - 1)
    own = prompt.gather(-1, column.expand(*prompt.shape[:-1], -1))
    in_trunk = torch.arange(tree.source.shape[1], device=own.device) < tree.trunk_slots
    return torch.where(in_trunk, own, following + tree.rank - tree.trunk[:, None])


def _masks(model: Any, inputs: Inputs, tree: GroupTree, embeds: Tensor, *, everything: bool) -> Any:
    """The decoder's attention mask, made once for all layers: for the nodes alone where that is
    enough, else for all rows.  Unless ``everything`` is wanted of the last layer, it may leave out
    what nobody reads."""
    family = FAMILIES[model.config.model_type]
    both_ways = _both_ways(family, inputs, tree)
    window = attention_window(model, tree.source.shape[1])
    if both_ways is None and window is None and use_tree_attention(family.decoder(model)):
        mask = layer_masks(model, tree.nodes, tree.nodes, embeds)
        mark_branches(mask, tree)
        if not everything and tree.nodes.numel():
            read_in_last_layer(family.decoder(model))
            mark_read(mask, tree)
        return mask
    visible = tree.visible()
    near = visible
    if window is not None:
        near = visible & (tree.rank[:, :, None] - tree.rank[:, None] < window)
    if both_ways is not None:
        visible, near = visible | both_ways, near | both_ways
    return layer_masks(model, visible, visible if window is None else near, embeds)


def attention_window(model: Any, length: int) -> int | None:
    """How far back some or all layers see, where sequences of ``length`` are longer than that."""
    window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
    return None if window is None or length <= window else window


def layer_masks(model: Any, visible: Tensor, near: Tensor, like: Tensor) -> Any:
    """Attention masks of the type of ``like``, additive [P, 1, n, L], from what n queries see of L
    keys, [P, n, L]: ``near`` in layers with a window and ``visible`` in the others; a mapping by
    type of layer where the two differ."""
    kind = like.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype

    def additive(seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    types = getattr(model.config.get_text_config(), "layer_types", None)
    if near is visible or types is None:
        return additive(near)
    return {"full_attention": additive(visible), "sliding_attention": additive(near)}


def _both_ways(family: Family, inputs: Inputs, tree: GroupTree) -> Tensor | None:
    """[P, L, L]: pairs of prompt tokens that see each other, in families that have them."""
    types = inputs.get(family.token_types) if family.token_types else None
    if types is None:
        return None
    column = tree.source.clamp(max=types.shape[1] - 1)
    member = tree.real & (tree.source < types.shape[1]) & (types.gather(1, column) == 0)
    return member[:, :, None] & member[:, None]


@functools.cache
def _warn_once(name: str, reason: str, copies: int) -> None:
    warnings.warn(
        f"{name} cannot share the prefix: {reason}. Its log-probs are computed with {copies} full "
        f"copies of every image and prompt, up to {copies} times the work and memory.",
        stacklevel=3,
    )
