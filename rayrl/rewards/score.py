"""Rewards of rollout groups: terms, weighted and summed.

A group that a term cannot score is dropped, with the reason; it never gets 0.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayrl.rewards.build import build_terms
from rayrl.rewards.cider import DocumentFrequency
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.deadline import UNLIMITED, Deadline
from rayrl.rewards.extras import extra_items, group_similarity
from rayrl.rewards.judgements import judgements, satisfied
from rayrl.rewards.statistics import Statistics, step_document_frequency
from rayrl.rewards.term import Failure, Item, Judged, Scores, scores_of
from rayrl.types import Completion, FloatArray, RolloutGroup, ScoredGroup

SIMILARITY_GROUPS = 32
"""Groups of a step whose Self-CIDEr is reported: as much as their scores' own time."""

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that could not be scored, and why."""

    prompt_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class TermScores:
    """What one term makes of a batch: for each group the scores of its captions, those of its
    greedy caption (None without one), or a failure; and the time it took.

    extras: for each group, by need of the objective, the scores of what was scored for it
    """

    groups: tuple[Scores | Judged | Failure, ...]
    greedy: tuple[Scores | Failure | None, ...]
    seconds: float
    extras: tuple[Mapping[str, tuple[Scores, ...] | Failure], ...] = ()


class Scorer:
    """Scores rollout groups with the terms of ``config``; ``needs`` are the objective's, some of
    which want more to be scored (``rayrl.rewards.extras``).  What terms that wait for others have
    not got from them within ``deadline`` of a batch is dropped."""

    def __init__(
        self,
        config: RewardConfig,
        statistics: Statistics,
        needs: Collection[str] = (),
        deadline: Deadline = UNLIMITED,
    ) -> None:
        """See ``rayrl.rewards.build.build_terms`` for what is refused."""
        self.config = config
        self._df = statistics.df
        self._needs = needs
        self._deadline = deadline
        self._terms = build_terms(config, statistics, deadline)

    def score(
        self, groups: Sequence[RolloutGroup], step_df: DocumentFrequency | None = None
    ) -> list[ScoredGroup | Dropped]:
        """Each group with its rewards, in order, or the reason why it has none."""
        scores = self.score_terms(groups, step_df)
        return combine(groups, scores, self.config, self.similarity(groups, step_df))

    def similarity(
        self,
        groups: Sequence[RolloutGroup],
        step_df: DocumentFrequency | None = None,
        first: int = SIMILARITY_GROUPS,
    ) -> list[FloatArray]:
        """How alike the captions of each group are, [G, G]: of all groups where the objective
        needs it, else of the ``first`` ones, for a metric.  Empty without document frequencies."""
        df = step_df or self._df
        if df is None:
            return []
        some = groups if "similarity" in self._needs else groups[:first]
        return group_similarity(some, df) if some else []

    def score_terms(
        self, groups: Sequence[RolloutGroup], step_df: DocumentFrequency | None = None
    ) -> dict[str, TermScores]:
        """The scores of each term by name, for ``combine``; different terms may come from
        different scorers.  ``step_df`` counts the step that the groups are a part of, under
        ``df: batch``; without it they are taken for the whole, and one alone is a ValueError."""
        if step_df is None and groups:
            references = {g.prompt.prompt_id: g.prompt.references for g in groups}
            step_df = step_document_frequency(references, self.config)
        self._deadline.start()
        items = [_item(group, group.completions, step_df) for group in groups]
        extras = [extra_items(item, self._needs) for item in items]
        # All of a group together: what a term has no time for are then the last groups.
        asked: list[Item] = []
        for group, item, made in zip(groups, items, extras, strict=True):
            asked.append(item)
            if group.greedy:
                asked.append(_item(group, (group.greedy,), step_df))
            asked += [i for some in made.values() for i in _unless_failed(some)]
        scores = {}
        for name, term in self._terms.items():
            start = time.perf_counter()
            results = iter(term.score(asked))
            parts = [
                _next_group(group, made, results)
                for group, made in zip(groups, extras, strict=True)
            ]
            scores[name] = TermScores(
                groups=tuple(own for own, _, _ in parts),
                greedy=tuple(greedy for _, greedy, _ in parts),
                extras=tuple(more for _, _, more in parts),
                seconds=time.perf_counter() - start,
            )
        return scores


def _next_group(
    group: RolloutGroup,
    made: Mapping[str, tuple[Item, ...] | Failure],
    results: Iterator[Scores | Judged | Failure],
) -> tuple[
    Scores | Judged | Failure,
    Scores | Failure | None,
    dict[str, tuple[Scores, ...] | Failure],
]:
    """The next results, those of a group: of its captions, of its greedy one, and of its extras."""
    own = next(results)
    greedy = scores_of(next(results)) if group.greedy else None
    return own, greedy, {need: _together(some, results) for need, some in made.items()}


def _unless_failed(items: tuple[Item, ...] | Failure) -> tuple[Item, ...]:
    return () if isinstance(items, Failure) else items


def _together(
    items: tuple[Item, ...] | Failure, results: Iterator[Scores | Judged | Failure]
) -> tuple[Scores, ...] | Failure:
    """The next results, one an item, or the first failure."""
    if isinstance(items, Failure):
        return items
    found = [scores_of(next(results)) for _ in items]
    failed = [result for result in found if isinstance(result, Failure)]
    return failed[0] if failed else tuple(r for r in found if not isinstance(r, Failure))


def combine(
    groups: Sequence[RolloutGroup],
    scores: Mapping[str, TermScores],
    config: RewardConfig,
    similarity: Sequence[FloatArray] = (),
    only_logged: Collection[str] = (),
) -> list[ScoredGroup | Dropped]:
    """Weighted sums of the scores of all terms of ``config``; ``similarity`` [G, G] of the first
    groups' captions goes with them.  The terms ``only_logged``, of weight 0, drop no group."""
    results = [
        _combine_one(group, i, scores, config, only_logged) for i, group in enumerate(groups)
    ]
    first = [
        replace(result, fields={**result.fields, "similarity": kernel})
        if isinstance(result, ScoredGroup)
        else result
        for result, kernel in zip(results, similarity, strict=False)
    ]
    return first + results[len(similarity) :]


def _combine_one(
    group: RolloutGroup,
    i: int,
    scores: Mapping[str, TermScores],
    config: RewardConfig,
    only_logged: Collection[str],
) -> ScoredGroup | Dropped:
    who = group.prompt.prompt_id
    weights = {name: weight for name, weight in config.weights.items() if name not in only_logged}
    for name in weights:
        if reason := problem(scores[name], i):
            return Dropped(who, f"{name}: {reason}")
    answers = {name: scores[name].groups[i] for name in weights}
    terms = {name: np.asarray(scores_of(answer)) for name, answer in answers.items()}
    judged = judgements(answers)
    if isinstance(judged, Failure):
        return Dropped(who, judged.reason)
    fields, spans = judged
    rewards = _weighted(weights, terms)
    greedy = _weighted(weights, {name: scores[name].greedy[i] for name in weights})
    for name, values in (("rewards", rewards), ("greedy reward", greedy)):
        if not np.isfinite(values).all():
            return Dropped(who, f"{name} {values.tolist()}: the weighted sum is beyond float32")
    extras = _extras(weights, scores, i)
    if "reference_rewards" in extras:
        fields["reference_rewards"] = np.concatenate(extras["reference_rewards"])
    if config.constraints:
        fields["judge_ok"] = satisfied(terms, config.constraints)
    return ScoredGroup(
        group=group,
        terms={name: values.astype(np.float32) for name, values in terms.items()},
        rewards=rewards,
        greedy_reward=None if group.greedy is None else float(greedy[0]),
        logged={name: _logged(scores[name].groups[i], group) for name in only_logged},
        fields=fields,
        wrong_spans=spans,
        prefix_rewards=tuple(extras["prefix_values"]) if "prefix_values" in extras else None,
    )


def _extras(
    weights: Mapping[str, float], scores: Mapping[str, TermScores], i: int
) -> dict[str, list[FloatArray]]:
    """By need, the rewards of what was scored beside group i, item by item."""
    by_term: dict[str, Mapping[str, Any]] = {
        name: scores[name].extras[i] if scores[name].extras else {} for name in weights
    }
    first = next(iter(by_term.values()))
    return {
        need: [
            _weighted(weights, {name: some[need][k] for name, some in by_term.items()})
            for k in range(len(first[need]))
        ]
        for need in first
    }


def _logged(answer: Scores | Judged | Failure, group: RolloutGroup) -> FloatArray:
    """The scores [G] of a term that is only logged, NaN where there is none."""
    scores = scores_of(answer)
    if isinstance(scores, Failure):
        return np.full(group.group_size, np.nan, np.float32)
    return np.where(np.abs(scores) <= _LARGEST, scores, np.nan).astype(np.float32)


def problem(term: TermScores, i: int) -> str:
    """Why a term's answers for group i cannot be used, if so."""
    extras = term.extras[i].values() if term.extras else ()
    for answer in (term.groups[i], term.greedy[i], *extras):
        if isinstance(answer, Failure):
            return answer.reason
        for values in answer if isinstance(answer, tuple) else (answer,):
            scores = values.scores if isinstance(values, Judged) else values
            # NaN is not within it either.
            if scores is not None and not (np.abs(scores) <= _LARGEST).all():
                return f"scores {scores.tolist()}, want finite ones that are within float32"
    return ""


def _weighted(weights: Mapping[str, float], scores: Mapping[str, Any]) -> FloatArray:
    """The weighted sum over terms, of scores of the same captions."""
    total = sum(
        weights[name] * np.asarray(scores[name]) for name in weights if scores[name] is not None
    )
    with np.errstate(over="ignore"):
        return np.asarray(total, dtype=np.float32)


def _item(
    group: RolloutGroup, completions: Sequence[Completion], step_df: DocumentFrequency | None
) -> Item:
    return Item(
        prompt=group.prompt,
        captions=tuple(completion.text for completion in completions),
        finished=tuple(completion.finish_reason == "stop" for completion in completions),
        step_df=step_df,
    )
