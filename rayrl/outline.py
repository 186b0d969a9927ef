"""A step's groups in numbers, for a driver that need not hold the groups themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np

from rayrl.rewards.diversity import diversity_of
from rayrl.rewards.score import Dropped
from rayrl.types import BoolArray, FloatArray, IntArray, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """P groups of N captions in all, in order, and the groups that were ``dropped`` beside them.

    By caption [N]: ``rewards``, ``terms`` by name (with NaN where one that is only logged has no
    score), ``lengths`` in tokens, of which ``forced`` were given, ``truncated`` at the length
    limit, ``weight_versions``.  By group [P]: ``sizes``, mean, spread and best of the rewards, the
    share of ``unique`` captions.  By those groups that have them: ``greedy_rewards``, and
    ``self_cider``, the diversity of a group's captions.
    """

    sizes: IntArray
    rewards: FloatArray
    terms: Mapping[str, FloatArray]
    lengths: IntArray
    forced: IntArray
    truncated: BoolArray
    weight_versions: IntArray
    means: FloatArray
    spreads: FloatArray
    bests: FloatArray
    unique: np.ndarray
    greedy_rewards: np.ndarray
    self_cider: np.ndarray
    dropped: tuple[Dropped, ...] = ()


class Results(Protocol):
    """What a round brought, in the order of its requests, wherever it is."""

    @property
    def outline(self) -> Outline:
        """In numbers."""

    def all(self) -> Sequence[ScoredGroup | Dropped]:
        """The groups themselves, and which were dropped."""

    def first(self, count: int) -> list[ScoredGroup]:
        """The first groups that were not dropped."""


@dataclass(frozen=True)
class Here:
    """Results that are in this process."""

    results: Sequence[ScoredGroup | Dropped]

    @cached_property
    def outline(self) -> Outline:
        return outline(self.results)

    def all(self) -> Sequence[ScoredGroup | Dropped]:
        return self.results

    def first(self, count: int) -> list[ScoredGroup]:
        return list(islice(whole(self.results), count))


def whole(results: Sequence[ScoredGroup | Dropped]) -> Sequence[ScoredGroup]:
    """The groups that were not dropped."""
    return [result for result in results if isinstance(result, ScoredGroup)]


def outline(results: Sequence[ScoredGroup | Dropped]) -> Outline:
    """Groups in numbers."""
    groups = whole(results)
    completions = [c for group in groups for c in group.group.completions]
    terms = [{**group.terms, **group.logged} for group in groups]
    kernels = [g.fields["similarity"] for g in groups if "similarity" in g.fields]
    greedy = [g.greedy_reward for g in groups if g.greedy_reward is not None]
    return Outline(
        sizes=np.array([group.group.group_size for group in groups], np.int32),
        rewards=_joined([group.rewards for group in groups]),
        terms={name: _joined([some[name] for some in terms]) for name in (terms or [{}])[0]},
        lengths=np.array([len(c.token_ids) for c in completions], np.int32),
        forced=np.array([c.num_forced for c in completions], np.int32),
        truncated=np.array([c.finish_reason == "length" for c in completions], np.bool_),
        weight_versions=np.array([c.weight_version for c in completions], np.int32),
        means=np.array([group.rewards.mean() for group in groups], np.float32),
        spreads=np.array([group.rewards.std() for group in groups], np.float32),
        bests=np.array([group.rewards.max() for group in groups], np.float32),
        unique=np.array([len(set(g.group.captions)) / g.group.group_size for g in groups]),
        greedy_rewards=np.array(greedy, np.float64),
        self_cider=np.array([diversity_of(k[None])[0] for k in kernels if len(k) > 1], np.float64),
        dropped=tuple(result for result in results if isinstance(result, Dropped)),
    )


def together(parts: Sequence[Outline]) -> Outline:
    """Parts of a step, one after the other.  Those without a group have no terms."""
    some = [part for part in parts if len(part.sizes)] or parts[:1]
    columns: dict[str, Any] = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Outline)
        if field.name not in ("terms", "dropped")
    }
    names = some[0].terms if some else ()
    return Outline(
        terms={name: _joined([part.terms[name] for part in some]) for name in names},
        dropped=tuple(dropped for part in parts for dropped in part.dropped),
        **columns,
    )


def _joined(rows: Sequence[FloatArray]) -> FloatArray:
    return np.concatenate([np.zeros(0, np.float32), *rows])
