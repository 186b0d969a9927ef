"""Batches on their way: sampled by rollout workers, scored by reward workers.

The driver submits every batch itself, and Ray runs one caller's calls on an actor in the order of
submission, so which version samples which batch is exact by construction.  A batch is cut in the
same parts however many workers there are, and seeds belong to prompts: who samples a part does not
matter for what comes out.  A part that was lost with its worker goes to another one, which pulls
the version that it was to be sampled with and then catches up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from rayrl.actors.losses import LOST
from rayrl.actors.pending import Calls, Pending, Share, no_answer, split
from rayrl.actors.pool import Pool
from rayrl.actors.versions import Versions
from rayrl.config import Config
from rayrl.engine.base import Sampling
from rayrl.planning import Request
from rayrl.rewards.score import SIMILARITY_GROUPS
from rayrl.rewards.statistics import step_document_frequency
from rayrl.shares import Scored
from rayrl.types import Prompt


class Batches:
    """Sends batches to the workers of two pools and brings back what became of them.

    ``versions`` are those that rollout workers can pull; with ``greedy_baseline`` each group comes
    with its arg-max caption."""

    def __init__(
        self,
        config: Config,
        rollout: Pool,
        reward: Pool,
        versions: Versions,
        *,
        greedy_baseline: bool,
    ) -> None:
        self._config = config
        self._rollout, self._reward, self._versions = rollout, reward, versions
        self._sampling = Sampling(
            group_size=config.train.group_size,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_tokens,
            greedy_baseline=greedy_baseline,
        )
        self.calls = Calls(config.rollout.timeout_s)
        self._scoring = Calls(config.train.reward_timeout_s)
        self._staged: dict[str, tuple[list[Prompt], Any]] = {}

    def stage(self, prompts: Sequence[Prompt]) -> None:
        """Put the prompts that the next batch is expected to begin with where workers find them,
        before it is submitted: workers that are busy need not wait for that then.  Others may
        come."""
        parts = split(list(prompts), self._config.rollout.max_workers)
        self._staged = {part[0].prompt_id: (part, ray.put(part)) for part in parts if part}

    def submit(
        self,
        step: int,
        version: int,
        requests: Sequence[Request],
        *,
        before: Pending | None = None,
    ) -> Pending:
        """Send a round of a step to be sampled with ``version`` and scored; does not wait,
        unless there are fewer workers than the minimum.

        ``before`` is the step's round before: document frequencies stay those of the first, so that
        the captions of a group are scored alike."""
        references = {r.prompt.prompt_id: r.prompt.references for r in requests}
        df = before.df if before else step_document_frequency(references, self._config.reward)
        if df is not None and not before:
            df = ray.put(df)
        pending = Pending(step=step, version=version, df=df)
        first = 0
        for i, part in enumerate(split(list(requests), self._config.rollout.max_workers)):
            if part:
                prompts = self._reference([request.prompt for request in part])
                share = Share(index=i, first=first, requests=part, prompts=prompts)
                self._send_to_sample(share, pending)
                pending.shares.append(share)
                first += len(part)
        # Not before every worker has something to do.
        for share in pending.shares:
            self._send_to_score(share, pending)
        return pending

    def wait_rollouts(self, pending: Pending) -> None:
        """Wait until every group of a batch is sampled; they go from worker to worker, and what
        is scored meanwhile comes here.  A worker that takes too long is replaced."""
        self._wait_sampled(pending.shares, pending, lambda: self._fetch_scored(pending))

    def collect(self, pending: Pending) -> list[Scored]:
        """What became of each part, in order.  Lost groups are sampled or scored again, all of them
        at the same time."""
        left = [share for share in pending.shares if share.result is None]
        while left:
            late = {left[i].index for i in self._scoring.late([s.scored for s in left])}
            self._fetch_scored(pending)
            left = [share for share in left if not self._came(share, pending, share.index in late)]
            # They may have been given to workers that hang.
            self._wait_sampled(left, pending)
        for share in pending.shares:
            self.calls.forget(share.rollout)
            self._scoring.forget(share.scored)
        return [share.result for share in pending.shares if share.result is not None]

    def _reference(self, prompts: list[Prompt]) -> Any:
        """A reference to the prompts of a part, which may have been staged."""
        staged, reference = self._staged.get(prompts[0].prompt_id, ([], None))
        return reference if staged == prompts else ray.put(prompts)

    def _send_to_sample(self, share: Share, pending: Pending) -> None:
        """Have a share sampled with the batch's version.  Workers take turns."""
        workers = self._rollout.wait()
        share.worker = workers[(pending.step + share.index) % len(workers)]
        behind = pending.version != self._versions.newest
        if behind:
            self._versions.load(share.worker, pending.version)
        draws = [request.draw for request in share.requests]
        share.rollout_sent = time.monotonic()
        share.rollout = share.worker.actor.generate.remote(
            share.prompts, draws, self._sampling, pending.version
        )
        self.calls.add(share.rollout, share.worker.number)
        if behind:
            self._versions.load(share.worker, self._versions.newest)

    def _send_to_score(self, share: Share, pending: Pending) -> None:
        scorers = self._reward.wait()
        share.scorer = scorers[(pending.step + share.index) % len(scorers)]
        self._scoring.forget(share.scored)
        share.scored_sent = time.monotonic()
        share.scored = share.scorer.actor.score_part.remote(
            share.prompts, share.rollout, pending.df, max(0, SIMILARITY_GROUPS - share.first)
        )
        self._scoring.add(share.scored, share.scorer.number)

    def _fetch_scored(self, pending: Pending) -> None:
        """Fetch the parts that are scored by now: the last ones are then all that is waited for."""
        waiting = {share.scored: share for share in pending.shares if share.result is None}
        if not waiting:
            return
        there, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0.0)
        with suppress(*LOST):
            # One call for all takes a fraction of the time of a call for each.
            for ref, result in zip(there, ray.get(there), strict=True):
                waiting[ref].result = result

    def _came(self, share: Share, pending: Pending, late: bool) -> bool:
        """Whether a share was scored; it is sent again where it was lost, or is ``late``."""
        limit_s = self._scoring.limit_s
        try:
            if share.result is None:
                share.result = ray.get(share.scored, timeout=0.0 if late else limit_s)
        except LOST as error:
            silent = isinstance(error, GetTimeoutError)
            cause = no_answer(limit_s, "train.reward_timeout_s") if silent else error
            self._recover(share, pending, cause)
            return False
        return True

    def _recover(self, share: Share, pending: Pending, error: Exception) -> None:
        """Redo what was lost of a share: its groups, or only their scores."""
        try:
            ray.get(share.rollout, timeout=self._config.rollout.timeout_s)
        except LOST as lost:
            self._sample_again(share, pending, lost)
        else:
            self._reward.lost(share.scorer, error, sent=share.scored_sent)
            self._send_to_score(share, pending)

    def _wait_sampled(
        self,
        shares: Sequence[Share],
        pending: Pending,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait until shares are sampled, by other workers where some do not answer in time."""
        while late := self.calls.late([share.rollout for share in shares], meanwhile):
            for i in late:
                cause = no_answer(self.calls.limit_s, "rollout.timeout_s")
                self._sample_again(shares[i], pending, cause)

    def _sample_again(self, share: Share, pending: Pending, cause: Exception) -> None:
        self.calls.forget(share.rollout)
        self._versions.lost(self._rollout, share.worker, cause, sent=share.rollout_sent)
        self._send_to_sample(share, pending)
        self._send_to_score(share, pending)
