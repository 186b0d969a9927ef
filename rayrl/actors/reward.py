"""Reward actors: cheap terms are scored in the reward worker, each other one in its own actor.

A term with needs of its own (Java, a GPU, a server) that is slow or dies is tried again, and then
drops the groups of its batch; the terms beside it go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from rayrl.actors.losses import DIED, construction_failed
from rayrl.actors.pool import SAY_EVERY_S
from rayrl.config import Config
from rayrl.rewards.cider import DocumentFrequency
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.deadline import (
    ATTEMPTS,
    Deadline,
    attempt_limit_s,
    call_limit_s,
    near_limit_s,
)
from rayrl.rewards.score import SIMILARITY_GROUPS, Dropped, Scorer, TermScores, combine, problem
from rayrl.rewards.statistics import Statistics, step_document_frequency
from rayrl.rewards.term import Failure
from rayrl.rewards.trial import trial_group
from rayrl.scaling import shortage
from rayrl.shares import Sampled, Scored
from rayrl.trace import Traced, traced
from rayrl.types import Prompt, RolloutGroup, ScoredGroup

log = logging.getLogger(__name__)

_MARGIN_S = 10.0


def placements(config: RewardConfig) -> dict[str, dict[str, float]]:
    """The terms that get an actor of their own, and what it asks Ray for; by default none."""
    return {
        name: {"num_cpus": term.asks.cpus, "num_gpus": term.asks.gpus}
        for name, term in config.terms.items()
        if term.asks is not None
    }


def check_terms(
    config: Config,
    statistics: Statistics,
    prompts: Sequence[Prompt],
    only_logged: Collection[str] = (),
) -> None:
    """Start every term once where it will run, have them score captions of an image, and end them
    again: before hours of training, not after.  The default terms need nothing and are not started.

    A term may have its reasons to give an image none, so of the training ``prompts`` the first ones
    are tried, one after the other, until there is a reward.  The terms ``only_logged`` need give
    none.

    Says every 30 s what is missing; RuntimeError for a term that does not start, or not within
    ``rollout.start_timeout_s``, and where the first images all are left without a reward.
    """
    reward, cpus = config.reward, config.train.reward_cpus
    if reward.terms == RewardConfig().terms:
        return
    deadline = time.monotonic() + config.rollout.start_timeout_s
    actor = RewardActor.options(  # type: ignore[attr-defined]
        num_cpus=cpus
    ).remote(
        reward,
        (ray.put(statistics),),
        config.train.reward_timeout_s,
        only_logged=tuple(only_logged),
    )
    try:
        _wait_for("room for a reward worker", actor.started.remote(), deadline, {"CPU": cpus})
        if apart := placements(reward):
            most = {
                name: max(asked[key] for asked in apart.values())
                for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus"))
            }
            ready = actor.ready.remote(max(0.0, deadline - time.monotonic()))
            # The actor gives up first, and says which term it was.
            _wait_for(f"the terms {', '.join(apart)}", ready, deadline + _MARGIN_S, most)
        _try_out(actor, config, prompts[:_TRIED])
    except DIED as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"the rewards do not start: {reason}") from error
    finally:
        ray.kill(actor)


_TRIED = 3
"""Training images of which one at least must have a reward."""


def _try_out(actor: Any, config: Config, prompts: Sequence[Prompt]) -> None:
    """Have a reward actor score one of the images; RuntimeError, with the last reason, where it
    can score none of them."""
    references = {prompt.prompt_id: prompt.references for prompt in prompts}
    step_df = step_document_frequency(references, config.reward)
    limit_s, reason = config.train.reward_timeout_s, ""
    for prompt in prompts:
        try:
            (result,) = ray.get(actor.score.remote([trial_group(prompt)], step_df), timeout=limit_s)
        except GetTimeoutError:
            raise RuntimeError(
                f"the rewards cannot score training image {prompt.prompt_id}: no answer within "
                f"train.reward_timeout_s, {limit_s:g} s"
            ) from None
        if not isinstance(result, Dropped):
            return
        reason = f"{result.prompt_id}: {result.reason}"
    raise RuntimeError(
        f"the rewards cannot score any of the first {len(prompts)} training images; the last, "
        f"{reason}"
    )


def _wait_for(what: str, ref: Any, deadline: float, asked: Mapping[str, float]) -> None:
    """Wait until an actor that asks Ray for ``asked`` has answered, and say every 30 s why not;
    RuntimeError at the deadline."""
    while not ray.wait([ref], timeout=max(0.0, min(SAY_EVERY_S, deadline - time.monotonic())))[0]:
        missing = shortage(asked, ray.cluster_resources(), ray.available_resources())
        if time.monotonic() >= deadline:
            raise RuntimeError(f"the rewards do not start: gave up waiting for {what}: {missing}")
        log.warning("rewards: waiting for %s: %s", what, missing)
    ray.get(ref)


# A part waits here until it is sampled; those that already are must not wait behind it.
@ray.remote(allow_out_of_order_execution=True)  # type: ignore[call-overload]
class RewardActor(Traced):
    """Scores whole batches of groups.

    ``statistics`` holds the one reference to what the driver counted (Ray would resolve a bare
    one), to be handed on to the terms apart as it is: a node holds it once.  ``timeout_s`` bounds
    a batch: a term drops what it has not got after a share of it (``rayrl.rewards.deadline``), and
    one apart that has not answered at all is started again and has as long once more.  The terms
    ``only_logged`` drop no group.
    """

    def __init__(
        self,
        config: RewardConfig,
        statistics: tuple[Any],
        timeout_s: float = 120.0,
        needs: Collection[str] = (),
        only_logged: Collection[str] = (),
    ) -> None:
        self._config = config
        self._only_logged = only_logged
        self._said = set[str]()
        self._limit_s = attempt_limit_s(timeout_s)
        apart = placements(config)
        near = [name for name in config.terms if name not in apart]
        (shared,) = statistics
        limit_s = near_limit_s(timeout_s)
        self._near = Scorer(_part(config, near), ray.get(shared), needs, Deadline(limit_s))
        limit_s = call_limit_s(timeout_s)
        self._apart = {
            name: _TermApart(name, _part(config, [name]), shared, asked, needs, limit_s)
            for name, asked in apart.items()
        }

    def started(self) -> None:
        """Answers once the terms are there."""

    @traced
    def score_part(
        self,
        prompts: Sequence[Prompt],
        sampled: Sampled,
        step_df: DocumentFrequency | None = None,
        similar: int = SIMILARITY_GROUPS,
    ) -> Scored:
        """:meth:`score`, of a part of a step on its way."""
        groups = sampled.unpacked(prompts)
        scores = self._score_terms(groups, step_df)
        results = self._combine(groups, scores, step_df, similar)
        return Scored.of(sampled, results, {name: some.seconds for name, some in scores.items()})

    def score(
        self,
        groups: list[RolloutGroup],
        step_df: DocumentFrequency | None = None,
        similar: int = SIMILARITY_GROUPS,
    ) -> list[ScoredGroup | Dropped]:
        """One result a group, in order: scored, or dropped with the reason.  ``step_df``: see
        ``Scorer.score_terms``; ``similar``: see ``Scorer.similarity``.

        RuntimeError where a term cannot start at all.
        """
        return self._combine(groups, self._score_terms(groups, step_df), step_df, similar)

    def _score_terms(
        self, groups: list[RolloutGroup], step_df: DocumentFrequency | None
    ) -> dict[str, TermScores]:
        if step_df is None and self._config.df == "batch" and self._config.counts_ngrams:
            raise ValueError(
                "reward.df batch: no document frequencies of the step, of which these groups may "
                "be a part; count them with step_document_frequency"
            )
        started = time.monotonic()
        shared = (ray.put(groups), ray.put(step_df)) if self._apart else ()
        for term in self._apart.values():
            term.submit(shared)
        scores = self._near.score_terms(groups, step_df)
        return scores | self._collect(groups, shared, started)

    def _combine(
        self,
        groups: list[RolloutGroup],
        scores: Mapping[str, TermScores],
        step_df: DocumentFrequency | None,
        similar: int,
    ) -> list[ScoredGroup | Dropped]:
        kernels = self._near.similarity(groups, step_df, similar)
        for name in set(self._only_logged) - self._said:
            problems = (problem(scores[name], i) for i in range(len(groups)))
            if reason := next(filter(None, problems), ""):
                self._said.add(name)
                log.warning("reward term %s, only logged, lacks scores: %s", name, reason)
        return combine(groups, scores, self._config, kernels, self._only_logged)

    def ready(self, limit_s: float) -> None:
        """Wait until every term apart has started; RuntimeError for one that does not, or not in
        time."""
        deadline = time.monotonic() + limit_s
        for term in self._apart.values():
            term.check(deadline)

    def _collect(
        self, groups: Sequence[RolloutGroup], shared: Sequence[Any], started: float
    ) -> dict[str, TermScores]:
        """What the terms apart answer that were asked at ``started``; they are waited for at the
        same time."""
        scores: dict[str, TermScores] = {}
        waiting, failures = dict(self._apart), dict[str, Failure]()
        for attempt in range(1, ATTEMPTS + 1):
            deadline = started + attempt * self._limit_s
            for name, term in waiting.items():
                answer = term.answer(deadline)
                if isinstance(answer, Failure):
                    failures[name] = answer
                else:
                    scores[name] = answer
            waiting = {name: term for name, term in waiting.items() if name not in scores}
            for term in waiting.values():
                # After the last attempt too: the next batch must not queue behind this one.
                term.restart()
                if attempt < ATTEMPTS:
                    term.submit(shared)
        seconds = time.monotonic() - started
        return scores | {name: _failed(groups, failures[name], seconds) for name in waiting}


class _TermApart:
    """A term in an actor of its own, and its answer to the batch that was last submitted."""

    def __init__(
        self,
        name: str,
        config: RewardConfig,
        statistics: Any,
        asked: Mapping[str, float],
        needs: Collection[str],
        limit_s: float,
    ) -> None:
        self._name, self._asked = name, asked
        self._arguments = (config, statistics, needs, limit_s)
        self._actor = self._start()
        self._answer: Any = None

    def check(self, deadline: float) -> None:
        """RuntimeError where the term does not start before ``deadline``."""
        self._answer = self._actor.ready.remote()
        answer = self.answer(deadline)
        if isinstance(answer, Failure):
            raise RuntimeError(f"reward term {self._name} does not start: {answer.reason}")

    def submit(self, batch: Sequence[Any]) -> None:
        self._answer = self._actor.score.remote(*batch)

    def answer(self, deadline: float) -> Any:
        """What its actor answers, or a failure.

        RuntimeError where the term cannot start: another attempt would not mend that.
        """
        left = max(0.0, deadline - time.monotonic())
        try:
            return ray.get(self._answer, timeout=left)
        except GetTimeoutError:
            return Failure(f"no answer in time from its actor, which asks for {dict(self._asked)}")
        except DIED as error:
            if construction_failed(error):
                reason = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"reward term {self._name} does not start: {reason}") from error
            return Failure("its actor died")

    def restart(self) -> None:
        ray.kill(self._actor)
        self._actor = self._start()

    def _start(self) -> Any:
        return TermActor.options(**self._asked).remote(*self._arguments)  # type: ignore[attr-defined]


@ray.remote
class TermActor:
    """One term of ``config``."""

    def __init__(
        self,
        config: RewardConfig,
        statistics: Statistics,
        needs: Collection[str],
        limit_s: float,
    ) -> None:
        self._scorer = Scorer(config, statistics, needs, Deadline(limit_s))

    def ready(self) -> None:
        """Answers once the term has started."""

    def score(self, groups: list[RolloutGroup], step_df: DocumentFrequency | None) -> TermScores:
        (scores,) = self._scorer.score_terms(groups, step_df).values()
        return scores


def _part(config: RewardConfig, names: Sequence[str]) -> RewardConfig:
    update = {"terms": {name: config.terms[name] for name in names}, "constraints": {}}
    return config.model_copy(update=update)


def _failed(groups: Sequence[RolloutGroup], failure: Failure, seconds: float) -> TermScores:
    return TermScores(
        groups=(failure,) * len(groups),
        greedy=tuple(failure if group.greedy else None for group in groups),
        seconds=seconds,
    )
