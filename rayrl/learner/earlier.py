"""Captions that an earlier checkpoint sampled for the same image, as further ones of its group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayrl.joins import OF_THE_IMAGE
from rayrl.types import TrainBatch

_PREFIX = "earlier/"

NOT_REMEMBERED = frozenset(
    {"judge_ok", "reward_versions", "similarity", "token_credit", "prefix_values"}
)
"""Fields of captions that the earlier one of a group does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class _Caption:
    token_ids: np.ndarray
    logprobs: np.ndarray
    reward: float
    version: int
    truncated: bool
    terms: Mapping[str, float]


class EarlierCaptions:
    """Remembers one caption an image, the first of its group, until the image comes again: by then
    it is one of an earlier checkpoint (SePPO, 2410.05255)."""

    def __init__(self) -> None:
        self._captions: dict[str, _Caption] = {}

    def joined(self, batch: TrainBatch) -> TrainBatch:
        """The batch with room for G + 1 captions a group: after its own, the one that was
        remembered, which ``earlier`` [P,G+1] marks, or none yet."""
        found = [self._captions.get(name) for name in batch.prompt_ids]
        # Of a run that was resumed with a term more: its reward is another one.
        now = batch.terms.keys()
        found = [old if old is not None and now <= old.terms.keys() else None for old in found]
        for i, name in enumerate(batch.prompt_ids):
            self._captions[name] = _caption(batch, i, 0)
        p, g, t = batch.shape
        place = batch.valid.sum(1)
        rows = [(i, int(place[i]), old) for i, old in enumerate(found) if old is not None]
        length = max([t, *(len(old.token_ids) for _, _, old in rows)])

        def with_tokens(array: np.ndarray, values: Callable[[_Caption], Any]) -> np.ndarray:
            whole = np.zeros((p, g + 1, length), array.dtype)
            whole[:, :g, :t] = array
            for i, j, old in rows:
                whole[i, j, : len(old.token_ids)] = values(old)
            return whole

        def with_value(array: np.ndarray, value: Callable[[_Caption], Any]) -> np.ndarray:
            whole = np.concatenate([array, np.zeros((p, 1), array.dtype)], 1)
            for i, j, old in rows:
                whole[i, j] = value(old)
            return whole

        forced = batch.forced
        return replace(
            batch,
            token_ids=with_tokens(batch.token_ids, lambda old: old.token_ids),
            mask=with_tokens(batch.mask, lambda old: True),
            rollout_logprobs=with_tokens(batch.rollout_logprobs, lambda old: old.logprobs),
            forced=None if forced is None else with_tokens(forced, lambda old: False),
            rewards=with_value(batch.rewards, lambda old: old.reward),
            weight_versions=with_value(batch.weight_versions, lambda old: old.version),
            truncated=with_value(batch.truncated, lambda old: old.truncated),
            terms={name: with_value(values, _term(name)) for name, values in batch.terms.items()},
            # What else is known of the captions is not known of the earlier one.
            fields={
                **{name: batch.fields[name] for name in batch.fields.keys() & OF_THE_IMAGE},
                "earlier": with_value(np.zeros((p, g), bool), lambda old: True),
            },
            wrong_spans=None,
            prefix_rewards=None,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps: the captions end to end."""
        if not self._captions:
            return {}
        captions = list(self._captions.values())
        names = sorted(set.intersection(*(set(c.terms) for c in captions)))
        numbers = [(c.reward, c.version, c.truncated, len(c.token_ids)) for c in captions]
        return {
            f"{_PREFIX}images": np.frombuffer("\n".join(self._captions).encode(), np.uint8),
            f"{_PREFIX}terms": np.frombuffer("\n".join(names).encode(), np.uint8),
            f"{_PREFIX}numbers": np.array(numbers, np.float64),
            f"{_PREFIX}of_terms": np.array([[c.terms[k] for k in names] for c in captions]),
            f"{_PREFIX}token_ids": np.concatenate([c.token_ids for c in captions]),
            f"{_PREFIX}logprobs": np.concatenate([c.logprobs for c in captions]),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`arrays`; without any, nothing is remembered."""
        self._captions = {}
        if f"{_PREFIX}images" not in arrays:
            return
        mine = {k.removeprefix(_PREFIX): arrays[k] for k in arrays if k.startswith(_PREFIX)}
        images, names = (mine[key].tobytes().decode().split("\n") for key in ("images", "terms"))
        ends = np.cumsum(mine["numbers"][:, 3].astype(int))[:-1]
        ids, logprobs = (np.split(mine[key], ends) for key in ("token_ids", "logprobs"))
        for i, (image, row) in enumerate(zip(images, mine["numbers"], strict=True)):
            of_terms = mine["of_terms"][i].tolist()
            terms = dict(zip(names, of_terms, strict=True)) if of_terms else {}
            self._captions[image] = _Caption(
                ids[i], logprobs[i], float(row[0]), int(row[1]), bool(row[2]), terms
            )


def _term(name: str) -> Callable[[_Caption], float]:
    return lambda old: old.terms[name]


def _caption(batch: TrainBatch, i: int, g: int) -> _Caption:
    here = batch.mask[i, g]
    return _Caption(
        batch.token_ids[i, g][here],
        batch.rollout_logprobs[i, g][here],
        float(batch.rewards[i, g]),
        int(batch.weight_versions[i, g]),
        bool(batch.truncated[i, g]),
        {name: float(values[i, g]) for name, values in batch.terms.items()},
    )
