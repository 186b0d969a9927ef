"""Rewards of rollout groups: terms, weighted and summed.

A group that a term cannot score is dropped, with the reason; it never gets 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayrl.rewards import ptb
from rayrl.rewards.build import build_terms
from rayrl.rewards.cider import CiderD, DocumentFrequency
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.statistics import Statistics
from rayrl.rewards.term import Failure, Item, Scores
from rayrl.types import Completion, RolloutGroup, ScoredGroup


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that could not be scored, and why."""

    prompt_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class TermScores:
    """What one term makes of a batch: for each group the scores of its captions, those of its
    greedy caption (None without one), or a failure; and the time it took."""

    groups: tuple[Scores | Failure, ...]
    greedy: tuple[Scores | Failure | None, ...]
    seconds: float


class Scorer:
    """Scores rollout groups with the terms of ``config``."""

    def __init__(self, config: RewardConfig, statistics: Statistics) -> None:
        """See ``rayrl.rewards.build.build_terms`` for what is refused."""
        self.config = config
        self._terms = build_terms(config, statistics)

    def score(
        self, groups: Sequence[RolloutGroup], step_df: DocumentFrequency | None = None
    ) -> list[ScoredGroup | Dropped]:
        """Each group with its rewards, in order, or the reason why it has none."""
        return combine(groups, self.score_terms(groups, step_df), self.config)

    def score_terms(
        self, groups: Sequence[RolloutGroup], step_df: DocumentFrequency | None = None
    ) -> dict[str, TermScores]:
        """The scores of each term by name, for ``combine``; different terms may come from
        different scorers.  ``step_df`` counts the step that the groups are a part of, under
        ``df: batch``; without it they are taken for the whole."""
        items = [_item(group, group.completions, step_df) for group in groups]
        greedy = [_item(group, (group.greedy,), step_df) for group in groups if group.greedy]
        scores = {}
        for name, term in self._terms.items():
            start = time.perf_counter()
            results = term.score([*items, *greedy])
            of_greedy = iter(results[len(groups) :])
            scores[name] = TermScores(
                groups=tuple(results[: len(groups)]),
                greedy=tuple(next(of_greedy) if group.greedy else None for group in groups),
                seconds=time.perf_counter() - start,
            )
        return scores


def combine(
    groups: Sequence[RolloutGroup], scores: Mapping[str, TermScores], config: RewardConfig
) -> list[ScoredGroup | Dropped]:
    """Weighted sums of the scores of all terms of ``config``."""
    return [_combine_one(group, i, scores, config) for i, group in enumerate(groups)]


def _combine_one(
    group: RolloutGroup, i: int, scores: Mapping[str, TermScores], config: RewardConfig
) -> ScoredGroup | Dropped:
    who = group.prompt.prompt_id
    terms: dict[str, Scores] = {}
    greedy_reward = 0.0
    for name, term in config.terms.items():
        greedy = scores[name].greedy[i]
        for values in (scores[name].groups[i], greedy):
            if isinstance(values, Failure):
                return Dropped(who, f"{name}: {values.reason}")
            if values is not None and not np.isfinite(values).all():
                return Dropped(who, f"{name}: scores {values.tolist()}, want finite ones")
        values = scores[name].groups[i]
        assert isinstance(values, np.ndarray)
        terms[name] = values
        if isinstance(greedy, np.ndarray):
            greedy_reward += term.weight * float(greedy[0])
    rewards = sum(term.weight * terms[name] for name, term in config.terms.items())
    return ScoredGroup(
        group=group,
        terms={name: values.astype(np.float32) for name, values in terms.items()},
        rewards=np.asarray(rewards, dtype=np.float32),
        greedy_reward=greedy_reward if group.greedy is not None else None,
    )


def _item(
    group: RolloutGroup, completions: Sequence[Completion], step_df: DocumentFrequency | None
) -> Item:
    return Item(
        prompt=group.prompt,
        captions=tuple(completion.text for completion in completions),
        finished=tuple(completion.finish_reason == "stop" for completion in completions),
        step_df=step_df,
    )


def corpus_cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a held-out set, 0..10, as pycocoevalcap reports it: PTB tokens, no ``<eos>``,
    document frequencies from the references of this set.  Raw text; one caption an image."""
    tokenized = [[ptb.tokenize(text) for text in some] for some in references]
    df = DocumentFrequency.from_references(tokenized, source="corpus")
    return float(CiderD(df).score([ptb.tokenize(text) for text in captions], tokenized).mean())
