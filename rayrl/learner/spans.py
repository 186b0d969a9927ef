"""From characters of captions, in which judges and reward terms speak, to tokens."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayrl.types import TrainBatch

_WORD = re.compile(r"\S+")


def token_ends(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """How many characters of ``text``, which ``ids`` [T] decode to but for space around it, are
    written after 0, 1, ..., T tokens; the end token writes none."""
    whole = tokenizer.decode(list(ids), skip_special_tokens=True)
    lead = len(whole) - len(whole.lstrip())
    ends = [0]
    for t in range(1, len(ids) + 1):
        written = len(tokenizer.decode(list(ids[:t]), skip_special_tokens=True)) - lead
        ends.append(min(max(ends[-1], written), len(text)))
    return ends


def with_token_fields(batch: TrainBatch, tokenizer: Any) -> TrainBatch:
    """The batch with ``token_credit`` [P,G,T] where it has wrong spans and ``prefix_values``
    [P,G,T+1] where it has rewards of prefixes."""
    if batch.wrong_spans is None and batch.prefix_rewards is None:
        return batch
    p, g, t = batch.shape
    credit, values = np.zeros((p, g, t), np.float32), np.zeros((p, g, t + 1), np.float32)
    for i in range(p):
        for j in range(len(batch.texts[i])):
            ids = batch.token_ids[i, j][batch.mask[i, j]]
            ends = token_ends(tokenizer, ids.tolist(), batch.texts[i][j])
            if batch.wrong_spans is not None:
                credit[i, j, : len(ids)] = _in_spans(ends, batch.wrong_spans[i][j])
            if batch.prefix_rewards is not None:
                whole = float(batch.rewards[i, j])
                rewards = [*batch.prefix_rewards[i][j].tolist(), whole]
                values[i, j] = whole
                values[i, j, : len(ids)] = [
                    rewards[n] for n in _words_within(ends[:-1], batch.texts[i][j])
                ]
    fields = dict(batch.fields)
    if batch.wrong_spans is not None:
        fields["token_credit"] = credit
    if batch.prefix_rewards is not None:
        fields["prefix_values"] = values
    return replace(batch, fields=fields)


def _in_spans(ends: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether a token wrote a character of any span."""
    written = itertools.pairwise(ends)
    return [any(max(a, start) < min(b, end) for start, end in spans) for a, b in written]


def _words_within(ends: Sequence[int], text: str) -> list[int]:
    """How many whole words the first ``ends`` characters hold."""
    words = [word.end() for word in _WORD.finditer(text)]
    return [sum(end <= here for end in words) for here in ends]
