"""A part of a step's groups on its way from worker to worker: columns, and no prompt.

The driver hands prompts, with their images, by reference to whoever needs them.  What was sampled
and scored for them travels apart from them, and is put together where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

from rayrl.outline import Outline, outline, together, whole
from rayrl.packing import Columns, pack, unpack
from rayrl.rewards.score import Dropped
from rayrl.types import Prompt, RolloutGroup, ScoredGroup


class Sampled(NamedTuple):
    """A group for each prompt of a part, and the ``seconds`` that sampling them took."""

    groups: Columns
    seconds: float

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], seconds: float) -> Sampled:
        return cls(pack(groups, without=("prompt",)), seconds)

    def unpacked(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """The groups of these prompts, which must be those that they were sampled for."""
        return unpack(RolloutGroup, self.groups, prompt=prompts)


class Scored(NamedTuple):
    """What became of a part: its rewards, by their places the groups that were ``dropped``, all of
    it in numbers, and the seconds that each reward term took."""

    sampled: Sampled
    scores: Columns
    dropped: Mapping[int, Dropped]
    outline: Outline
    term_seconds: Mapping[str, float]

    @classmethod
    def of(
        cls,
        sampled: Sampled,
        results: Sequence[ScoredGroup | Dropped],
        term_seconds: Mapping[str, float],
    ) -> Scored:
        """``results`` are those of the groups of ``sampled``, in order."""
        return cls(
            sampled=sampled,
            scores=pack(whole(results), without=("group",)),
            dropped={i: some for i, some in enumerate(results) if isinstance(some, Dropped)},
            outline=outline(results),
            term_seconds=term_seconds,
        )

    def unpacked(self, prompts: Sequence[Prompt]) -> list[ScoredGroup | Dropped]:
        """The results for these prompts, in order."""
        groups = self.sampled.unpacked(prompts)
        kept = [group for i, group in enumerate(groups) if i not in self.dropped]
        scored = iter(unpack(ScoredGroup, self.scores, group=kept))
        return [self.dropped.get(i) or next(scored) for i in range(len(groups))]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Results in parts: for each its prompts and what became of them, and ``references`` under
    which others find the prompts."""

    prompts: Sequence[Sequence[Prompt]]
    scored: Sequence[Scored]
    references: Sequence[Any]

    @cached_property
    def outline(self) -> Outline:
        return together([part.outline for part in self.scored])

    def all(self) -> list[ScoredGroup | Dropped]:
        return list(self._results())

    def first(self, count: int) -> list[ScoredGroup]:
        groups = (result for result in self._results() if isinstance(result, ScoredGroup))
        return list(islice(groups, count))

    def _results(self) -> Iterator[ScoredGroup | Dropped]:
        unpacked = (s.unpacked(p) for p, s in zip(self.prompts, self.scored, strict=True))
        return chain.from_iterable(unpacked)
