"""Captions that an earlier checkpoint sampled for the same image, as further ones of its group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from rayrl.types import TrainBatch

_PREFIX = "earlier/"


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
        """The batch with G + 1 captions a group.  ``earlier`` [P,G+1] marks those that were
        remembered; where there is none yet, the last one is a copy that is not ``valid``."""
        here = [_caption(batch, i, 0) for i in range(len(batch.prompt_ids))]
        found = [self._captions.get(name) for name in batch.prompt_ids]
        rows = [own if old is None else old for own, old in zip(here, found, strict=True)]
        self._captions.update(zip(batch.prompt_ids, here, strict=True))
        known = np.array([old is not None for old in found])
        p, g, t = batch.shape
        length = max(t, *(len(row.token_ids) for row in rows))

        def widened(array: np.ndarray, last: list[np.ndarray]) -> np.ndarray:
            whole = np.zeros((p, g + 1, length), array.dtype)
            whole[:, :g, :t] = array
            for i, values in enumerate(last):
                whole[i, g, : len(values)] = values
            return whole

        def further(array: np.ndarray, last: list[float]) -> np.ndarray:
            return np.concatenate([array, np.array(last, array.dtype)[:, None]], 1)

        false = np.zeros((p, g), bool)
        return replace(
            batch,
            token_ids=widened(batch.token_ids, [row.token_ids for row in rows]),
            mask=widened(batch.mask, [np.ones(len(row.token_ids), bool) for row in rows]),
            rollout_logprobs=widened(batch.rollout_logprobs, [row.logprobs for row in rows]),
            rewards=further(batch.rewards, [row.reward for row in rows]),
            weight_versions=further(batch.weight_versions, [row.version for row in rows]),
            truncated=further(batch.truncated, [row.truncated for row in rows]),
            terms={
                name: further(values, [row.terms[name] for row in rows])
                for name, values in batch.terms.items()
            },
            # What else is known of the captions is not known of the earlier one.
            fields={
                "earlier": np.concatenate([false, known[:, None]], 1),
                "valid": np.concatenate([batch.valid, known[:, None]], 1),
            },
            wrong_spans=None,
            prefix_rewards=None,
            forced=None
            if batch.forced is None
            else widened(batch.forced, [np.zeros(len(row.token_ids), bool) for row in rows]),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps: the captions end to end."""
        if not self._captions:
            return {}
        captions = list(self._captions.values())
        names = sorted(captions[0].terms)
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
        mine = {k.removeprefix(_PREFIX): v for k, v in arrays.items() if k.startswith(_PREFIX)}
        images, names = (mine[key].tobytes().decode().split("\n") for key in ("images", "terms"))
        ends = np.cumsum(mine["numbers"][:, 3].astype(int))[:-1]
        ids, logprobs = (np.split(mine[key], ends) for key in ("token_ids", "logprobs"))
        for i, (image, row) in enumerate(zip(images, mine["numbers"], strict=True)):
            of_terms = mine["of_terms"][i].tolist()
            terms = dict(zip(names, of_terms, strict=True)) if of_terms else {}
            self._captions[image] = _Caption(
                ids[i], logprobs[i], float(row[0]), int(row[1]), bool(row[2]), terms
            )


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
