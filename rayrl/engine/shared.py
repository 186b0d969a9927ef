"""Groups of captions, sampled after prompts that are computed once.

``generate`` copies image and prompt G times before it begins.  Here a prompt's keys and values
are computed once, with the learner's own code, and stay once: the G captions of a prompt are G
queries at a time against one row of keys, which holds the prompt and all tokens of all captions
so far; a mask lets each caption see the prompt and itself.  It is the learner's tree
(``learner/tree.py``) as it grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from rayrl.engine.draw import Drawn, choose
from rayrl.learner.chunked import Sampling
from rayrl.learner.families import FAMILIES, Inputs, encode_images
from rayrl.learner.logprobs import attention_window, decode_rows, layer_masks
from rayrl.learner.tree import build_tree

# Columns are dropped when at least a quarter of them has ended: gathering costs a little too.
_SHRINK_AT = 0.75


class SharedCache(Cache):
    """Keys and values [P, heads, L, D] of every layer, in memory that is taken once.  A pass
    writes them where the last one ended; ``advance`` says that it is over."""

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self._slots = slots
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.filled = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self._pairs):
            given = (key_states, value_states)
            shapes = [(*each.shape[:2], self._slots, each.shape[3]) for each in given]
            key, value = (g.new_empty(shape) for g, shape in zip(given, shapes, strict=True))
            self._pairs.append((key, value))
        key, value = self._pairs[layer_idx]
        end = self.filled + key_states.shape[2]
        key[:, :, self.filled : end] = key_states
        value[:, :, self.filled : end] = value_states
        return key[:, :, :end], value[:, :, :end]

    def advance(self, slots: int) -> None:
        self.filled += slots

    def keep(self, prompts: Tensor) -> None:
        """Keep these prompts only."""
        self._pairs = [(key[prompts], value[prompts]) for key, value in self._pairs]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Positions are given with every pass; none is to be guessed from the length.
        return 0


@torch.inference_mode()
def sample_groups(
    model: Any,
    inputs: Inputs,
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    banned_ids: Sequence[int],
    eos_ids: Sequence[int],
    uniform: Tensor | None,
    forced: Sequence[Sequence[int]],
    image_features: Sequence[Tensor] | None = None,
) -> Drawn:
    """Sample ``group_size`` captions of each of P prompts from a bare model whose prefix can be
    shared (``learner.families.refusal``).

    inputs: the processor's output, as ``prefix_shared_logprobs`` takes it
    temperature, banned_ids: logits are divided by the temperature, those of banned ids are -inf
    uniform: [P, G, T] of ``draw.uniforms``; None takes the most probable token
    forced: for each prompt the tokens that its captions begin with, of log-prob 0
    image_features: what a ``FeatureCache`` has of the prompts' images
    """
    device = inputs["input_ids"].device
    count = len(inputs["input_ids"])
    sampling = Sampling(
        temperature=temperature,
        banned=tuple(banned_ids),
        softcap=FAMILIES[model.config.model_type].softcap(model),
    )
    decoding = _Decoding(model, inputs, group_size, max_tokens, sampling, image_features)
    ids = torch.zeros(count, group_size, max_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, group_size, max_tokens, device=device)
    given = _forced_tokens(forced, max_tokens).to(device)
    ends = torch.tensor(list(eos_ids), device=device)
    uniform = None if uniform is None else uniform.to(device)
    scores = decoding.first_logprobs()
    alive = torch.ones(count, group_size, dtype=torch.bool, device=device)
    for step in range(max_tokens):
        rows = (decoding.prompts[:, None], decoding.members, step)
        chosen = choose(scores, None if uniform is None else uniform[rows].flatten())
        picked = scores.gather(1, chosen[:, None]).view(alive.shape)
        chosen = chosen.view(alive.shape)
        if step < max(map(len, forced), default=0):
            fixed = given[decoding.prompts, step, None].expand_as(chosen)
            chosen = torch.where(fixed >= 0, fixed, chosen)
            picked = picked.masked_fill(fixed >= 0, 0.0)
        ids[rows], logprobs[rows] = chosen, picked
        alive = alive & ~torch.isin(chosen, ends)
        if step == max_tokens - 1 or not alive.any():
            break
        chosen, alive = decoding.drop_ended(chosen, alive)
        scores = decoding.next_logprobs(chosen)
    return Drawn(ids=ids, logprobs=logprobs)


def _forced_tokens(forced: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
    """[P, T], -1 where a token is to be sampled."""
    return torch.tensor([[*ids, *[-1] * (max_tokens - len(ids))] for ids in forced])


class _Decoding:
    """The decoder between tokens, for captions that have not all ended.

    prompts: [p] which of the P prompts are left; members: [p, c] which captions of each, the same
        number c for all, so that some that ended may be among them
    seen: [p, c, slots] which keys each caption sees; rank: [p, slots] tokens before each key on its
        caption's path
    """

    def __init__(
        self,
        model: Any,
        inputs: Inputs,
        group_size: int,
        max_tokens: int,
        sampling: Sampling,
        features: Sequence[Tensor] | None,
    ) -> None:
        device = inputs["input_ids"].device
        count = len(inputs["input_ids"])
        self._model, self._sampling = model, sampling
        self._family = FAMILIES[model.config.model_type]
        # A group of one caption of one token: the tree is the prompts alone.
        token = torch.zeros(count, 1, 1, dtype=torch.long)
        prompt_mask = inputs["attention_mask"].cpu().bool()
        tree = build_tree(prompt_mask, token, torch.ones_like(token, dtype=torch.bool)).to(device)
        trunk = tree.trunk_slots
        slots = trunk + group_size * (max_tokens - 1)
        self._cache = SharedCache(slots)
        # Before a GPU has the vision tower to run, for which they would wait.
        positions = self._family.positions(model, inputs)
        if features is None:
            features = encode_images(model, inputs)
        given = (token.to(device), tree, features, positions)
        self._last = decode_rows(model, inputs, *given, self._cache)
        self._cache.advance(trunk)
        self._group_size = group_size
        unpadded = positions.masked_fill(inputs["attention_mask"] == 0, -1)
        self._position = unpadded.amax(-1, keepdim=True) + 1
        self._window = attention_window(model, trunk + max_tokens)
        self._step = 0
        self._trunk = tree.trunk[:, None]
        self.prompts = torch.arange(count, device=device)
        self.members = torch.arange(group_size, device=device).expand(count, -1)
        self._rank = torch.arange(slots, device=device).repeat(count, 1)
        in_trunk = self._rank < self._trunk
        self._seen = in_trunk[:, None].repeat(1, group_size, 1)

    def first_logprobs(self) -> Tensor:
        """[P * G, V]: of the first token, computed once a prompt."""
        return self._logprobs(self._last).repeat_interleave(self._group_size, 0)

    def next_logprobs(self, tokens: Tensor) -> Tensor:
        """[p * c, V] after one more token [p, c] of each caption."""
        columns, start = tokens.shape[1], self._cache.filled
        new = slice(start, start + columns)
        self._seen[:, :, new] = torch.eye(columns, dtype=torch.bool, device=tokens.device)
        self._rank[:, new] = self._trunk + self._step
        embeds = self._model.get_input_embeddings()(tokens)
        position = self._position + self._step
        output = self._family.decoder(self._model)(
            inputs_embeds=embeds,
            attention_mask=self._masks(new.stop, embeds),
            position_ids=position.expand(*position.shape[:-1], columns),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache.advance(columns)
        self._step += 1
        return self._logprobs(output.last_hidden_state.flatten(0, 1))

    def drop_ended(self, tokens: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Leave out prompts all whose captions have ended, and as many columns as every other
        prompt can spare, where that is worth it; returns what is left of both [p, c]."""
        counts = alive.sum(1)
        columns, prompts = int(counts.max()), int((counts > 0).sum())
        if prompts * columns > _SHRINK_AT * alive.numel():
            return tokens, alive
        kept = (counts > 0).nonzero()[:, 0]
        order = alive[kept].to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        order = order[:, :columns]
        rows = (kept[:, None], order)
        if len(kept) < len(alive):
            self._cache.keep(kept)
            self.prompts, self._rank, self._trunk = (
                each[kept] for each in (self.prompts, self._rank, self._trunk)
            )
            self._position = self._position.index_select(-2, kept)
        self.members, self._seen = self.members[rows], self._seen[rows]
        return tokens[rows], alive[rows]

    def _masks(self, end: int, embeds: Tensor) -> Any:
        visible = near = self._seen[:, :, :end]
        if self._window is not None:
            behind = self._trunk + self._step - self._rank[:, :end]
            near = visible & (behind < self._window)[:, None]
        return layer_masks(self._model, visible, near, embeds)

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return self._sampling.log_softmax(self._model.get_output_embeddings()(hidden))
