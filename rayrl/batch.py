"""From scored groups to the batch that the learner trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rayrl.types import BoolArray, FloatArray, ScoredGroup, TrainBatch


def make_batch(groups: Sequence[ScoredGroup]) -> TrainBatch:
    """Pad the completions of P groups to the longest, T tokens, and the groups to the largest, G
    captions, and line up their rewards.

    Raises ValueError on no group and on groups with different reward terms.
    """
    if not groups:
        raise ValueError("no group to train on: every group of the step was dropped")
    size = max(group.group.group_size for group in groups)
    terms = set(groups[0].terms)
    for group in groups:
        who = group.group.prompt.prompt_id
        if set(group.terms) != terms:
            raise ValueError(f"prompt {who}: terms {sorted(group.terms)}, want {sorted(terms)}")
    completions = [group.group.completions for group in groups]
    captions = [caption for row in completions for caption in row]
    # [P, G] which captions there are; arrays of all captions are laid out in its order.
    valid = np.arange(size) < np.array([[len(row)] for row in completions])
    lengths = _spread(valid, [len(c.token_ids) for c in captions])
    places = np.arange(lengths.max())
    mask = places < lengths[..., None]
    ids, logprobs = np.zeros(mask.shape, np.int32), np.zeros(mask.shape, np.float32)
    ids[mask] = np.concatenate([c.token_ids for c in captions])
    logprobs[mask] = np.concatenate([c.logprobs for c in captions])
    forced = places < _spread(valid, [c.num_forced for c in captions])[..., None]
    greedy = [group.greedy_reward for group in groups]
    spans = [group.wrong_spans for group in groups]
    prefixes = [group.prefix_rewards for group in groups]
    return TrainBatch(
        prompt_ids=tuple(group.group.prompt.prompt_id for group in groups),
        images=tuple(group.group.prompt.image for group in groups),
        prompt_token_ids=tuple(group.group.prompt_token_ids for group in groups),
        token_ids=ids,
        mask=mask,
        rollout_logprobs=logprobs,
        rewards=_padded([group.rewards for group in groups], size),
        weight_versions=_spread(valid, [c.weight_version for c in captions]),
        truncated=_spread(valid, [c.finish_reason == "length" for c in captions], np.bool_),
        terms={name: _padded([g.terms[name] for g in groups], size) for name in sorted(terms)},
        greedy_rewards=None
        if any(value is None for value in greedy)
        else np.array(greedy, np.float32),
        texts=tuple(tuple(c.text for c in row) for row in completions),
        references=tuple(group.group.prompt.references for group in groups),
        fields=_stacked([group.fields for group in groups]),
        wrong_spans=None if None in spans else tuple(some for some in spans if some is not None),
        prefix_rewards=None
        if any(some is None for some in prefixes)
        else tuple(some for some in prefixes if some is not None),
        forced=forced if forced.any() else None,
    )


def _spread(valid: BoolArray, values: Sequence[float], dtype: type = np.int32) -> np.ndarray:
    """A value of each caption as [P, G], 0 where there is no caption."""
    out: np.ndarray = np.zeros(valid.shape, dtype)
    out[valid] = values
    return out


def _padded(rows: Sequence[FloatArray], size: int) -> FloatArray:
    """Rows of at most ``size`` values as [P, size], 0 where there is no caption."""
    return np.stack(
        [row if len(row) == size else np.pad(row, (0, size - len(row))) for row in rows]
    )


def _stacked(fields: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields that every group has, [P, ...]; shorter ones end in 0, numbers of the image in
    NaN."""
    names = set.intersection(*(set(some) for some in fields))
    stacked = {}
    for name in sorted(names):
        rows = [some[name] for some in fields]
        longest = max(len(row) for row in rows)
        if any(len(row) < longest for row in rows):
            fill = np.nan if rows[0].dtype.kind == "f" and rows[0].ndim == 1 else 0
            rows = [np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows]
        stacked[name] = np.stack(rows)
    return stacked
