"""From scored groups to the batch that the learner trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rayrl.types import ScoredGroup, TrainBatch


def make_batch(groups: Sequence[ScoredGroup]) -> TrainBatch:
    """Pad the completions of P groups to the longest, T tokens, and line up their rewards.

    Raises ValueError on no group, on groups of different sizes or with different reward terms.
    """
    if not groups:
        raise ValueError("no group to train on: every group of the step was dropped")
    size = groups[0].group.group_size
    terms = set(groups[0].terms)
    for group in groups:
        who = group.group.prompt.prompt_id
        if group.group.group_size != size:
            raise ValueError(f"prompt {who}: a group of {group.group.group_size}, want {size}")
        if set(group.terms) != terms:
            raise ValueError(f"prompt {who}: terms {sorted(group.terms)}, want {sorted(terms)}")
    completions = [group.group.completions for group in groups]
    length = max(len(c.token_ids) for row in completions for c in row)
    shape = (len(groups), size, length)
    ids, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    mask = np.zeros(shape, np.bool_)
    for p, row in enumerate(completions):
        for g, completion in enumerate(row):
            n = len(completion.token_ids)
            ids[p, g, :n] = completion.token_ids
            logprobs[p, g, :n] = completion.logprobs
            mask[p, g, :n] = True
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
        rewards=np.stack([group.rewards for group in groups]),
        weight_versions=np.array(
            [[c.weight_version for c in row] for row in completions], np.int32
        ),
        truncated=np.array([[c.finish_reason == "length" for c in row] for row in completions]),
        terms={name: np.stack([group.terms[name] for group in groups]) for name in sorted(terms)},
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
    )


def _stacked(fields: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields that every group has, [P, ...]; shorter ones end in NaN."""
    names = set.intersection(*(set(some) for some in fields))
    stacked = {}
    for name in sorted(names):
        rows = [some[name] for some in fields]
        longest = max(len(row) for row in rows)
        if any(len(row) < longest for row in rows):
            rows = [np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows]
        stacked[name] = np.stack(rows)
    return stacked
