"""The usual way to a group's log-probs: G full copies of every image and prompt.

It runs the model's own forward pass and a plain softmax over all logits, which makes it slow and
the oracle of ``logprobs.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayrl.learner.chunked import Sampling
from rayrl.learner.families import FAMILIES, Family, Inputs, bare_model, family_of
from rayrl.learner.states import TokenStates


class LogprobOutput(NamedTuple):
    """Log-probs [P, G, T] of the sampled tokens and, when asked for, the entropy [P, G, T] of the
    distribution each was sampled from; float32, nats, 0 where the completion mask is False.  And,
    when asked for, the hidden states that they come from."""

    logprobs: Tensor
    entropy: Tensor | None
    states: TokenStates | None = None


def naive_logprobs(
    model: Any,
    prompt_inputs: Inputs,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """Log-probs [P, G, T] of P groups of completions, from G full copies of image and prompt.

    Arguments and errors are those of ``prefix_shared_logprobs``."""
    return naive_outputs(
        model, prompt_inputs, completion_ids, completion_mask, temperature, banned_ids
    ).logprobs


def naive_outputs(
    model: Any,
    prompt_inputs: Inputs,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    *,
    with_entropy: bool = False,
    with_states: bool = False,
) -> LogprobOutput:
    """``naive_logprobs`` with the entropy, with the hidden states."""
    bare = bare_model(model)
    check(bare, prompt_inputs, completion_ids, completion_mask, temperature, banned_ids)
    device = prompt_inputs["input_ids"].device
    mask = completion_mask.to(device).bool()
    # Filler must not be the placeholder id, for which the model would look for an image.
    filler = int(getattr(bare.config, "image_token_id", None) == 0)
    ids = completion_ids.to(device).long().masked_fill(~mask, filler)
    p, g, t = ids.shape
    family = family_of(bare, prompt_inputs)
    inputs = _copies(bare, family, prompt_inputs, ids, mask)
    if "logits_to_keep" in inspect.signature(bare.forward).parameters:
        inputs["logits_to_keep"] = t + 1
    head, before_head = bare.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda _, given: before_head.append(given[0]))
    try:
        logits = model(**inputs, use_cache=False).logits[:, -t - 1 : -1]
    finally:
        hook.remove()
    scores = logits.float() / temperature
    if banned_ids:
        scores[..., list(banned_ids)] = float("-inf")
    logprobs = scores.log_softmax(-1).view(p, g, t, -1)
    picked = logprobs.gather(-1, ids[..., None])[..., 0]
    picked = picked.masked_fill(~mask, 0.0)
    entropy = states = None
    if with_entropy:
        finite = logprobs.masked_fill(logprobs == float("-inf"), 0.0)
        entropy = -(logprobs.exp() * finite).sum(-1).masked_fill(~mask, 0.0)
    if with_states:
        sampled = mask.flatten().nonzero()[:, 0]
        states = TokenStates(
            hidden=before_head[0][:, -t - 1 : -1].flatten(0, 1)[sampled],
            row=torch.arange(len(sampled), device=device),
            sampled=sampled,
            ids=ids,
            head=head,
            sampling=Sampling(
                temperature=temperature, banned=tuple(banned_ids), softcap=family.softcap(bare)
            ),
        )
    return LogprobOutput(picked, entropy, states)


def _copies(
    model: Any, family: Family, inputs: Inputs, ids: Tensor, mask: Tensor
) -> dict[str, Any]:
    """The model's inputs for P * G rows of prompt and completion, prompts padded on the left."""
    p, g, t = ids.shape
    prompt_mask = inputs["attention_mask"]
    order = prompt_mask.long().argsort(dim=1, stable=True)
    tails = {"input_ids": ids.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
    rows: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in family.image_inputs or not isinstance(value, Tensor):
            continue
        if value.shape[:2] != order.shape:
            rows[name] = value.repeat_interleave(g, 0) if len(value) == p else value
            continue
        body = value.gather(1, order).repeat_interleave(g, 0)
        tail = tails.get(name, body.new_full((p * g, t), int(name == family.token_types)))
        rows[name] = torch.cat([body, tail.to(body.dtype)], dim=1)
    rows |= family.take_images(inputs, family.image_inputs, [i for i in range(p) for _ in range(g)])
    if model.config.model_type in FAMILIES:
        rows["position_ids"] = family.positions(model, rows)
    return rows


def check(
    model: Any,
    inputs: Inputs,
    ids: Tensor,
    mask: Tensor,
    temperature: float,
    banned_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Ids [P, G, T] int64 and mask [P, G, T] bool on the CPU, or ValueError naming the row."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature}, want a positive number")
    vocabulary = len(model.get_output_embeddings().weight)
    if unknown := [i for i in banned_ids if not 0 <= i < vocabulary]:
        raise ValueError(f"banned ids {unknown} are outside the vocabulary of {vocabulary}")
    text = model.config.get_text_config()
    if text.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__}: its text part {text.model_type!r} is an encoder-decoder, "
            "want a decoder-only one"
        )
    ids, mask = ids.cpu().long(), mask.cpu().bool()
    if ids.ndim != 3 or mask.shape != ids.shape:
        raise ValueError(
            f"completion_ids {tuple(ids.shape)} and completion_mask {tuple(mask.shape)}, "
            "want both [P, G, T]"
        )
    if not ids.numel():
        raise ValueError(f"completion_ids {tuple(ids.shape)}, want P, G and T of at least 1")
    for name in ("input_ids", "attention_mask"):
        got = inputs.get(name)
        if got is None or got.ndim != 2 or len(got) != len(ids):
            shape = None if got is None else tuple(got.shape)
            raise ValueError(f"prompt_inputs {name} of shape {shape}, want [{len(ids)}, S]")
    lengths = mask.sum(-1, keepdim=True)
    holes = (mask != (torch.arange(ids.shape[-1]) < lengths)).any(-1)
    _raise_at(holes, "has a mask with a hole; sampled tokens come first")
    image_id = getattr(model.config, "image_token_id", None)
    _raise_at(((ids == image_id) & mask).any(-1), f"contains the image placeholder id {image_id}")
    outside = ((ids < 0) | (ids >= vocabulary)) & mask
    _raise_at(outside.any(-1), f"contains an id outside the vocabulary of {vocabulary}")
    banned = torch.isin(ids, torch.tensor(list(banned_ids), dtype=torch.long)) & mask
    _raise_at(banned.any(-1), f"contains one of the banned ids {sorted(banned_ids)}")
    empty = (inputs["attention_mask"].sum(1) == 0).nonzero()
    if len(empty):
        raise ValueError(f"prompt row {int(empty[0])}: no token, attention_mask is all 0")
    return ids, mask


def _raise_at(bad: Tensor, what: str) -> None:
    if bad.any():
        p, g = bad.nonzero()[0].tolist()
        raise ValueError(f"prompt row {p}: completion {g} {what}")
