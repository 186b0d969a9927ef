"""The workers of a run: two pools, the weights that rollout workers hold, and how many there are.

Batches go through them in :mod:`rayrl.actors.batches`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from rayrl.actors.batches import Batches
from rayrl.actors.direct import direct_transfer
from rayrl.actors.learner_group import LearnerGroup
from rayrl.actors.losses import LOST
from rayrl.actors.pending import Pending, late_ones, no_answer, split
from rayrl.actors.pool import RestartBudget, Worker
from rayrl.actors.versions import Call, Source, Versions
from rayrl.actors.workers import reward_pool, rollout_pool
from rayrl.canary import Canary
from rayrl.config import Config
from rayrl.interrupt import StopRequest
from rayrl.planning import Request
from rayrl.rewards.statistics import Statistics
from rayrl.scaling import WINDOW, StepTimes, wanted_workers
from rayrl.shares import Parts
from rayrl.types import Completion, Prompt
from rayrl.weights import ModelFiles, Weights, without_weights

log = logging.getLogger(__name__)


class Fleet:
    """Rollout and reward workers and the weight versions they pull.

    ``files`` are the model's files, of which engines get all but the weights; ``statistics`` is
    what rewards are scored against; replaced workers are counted against ``budget``, which is the
    run's.  ``learner`` is who sends engines their weights, or shares its GPU with one, where
    ``config.rollout`` says so.
    """

    def __init__(
        self,
        config: Config,
        files: ModelFiles,
        statistics: Statistics,
        budget: RestartBudget,
        *,
        greedy_baseline: bool,
        learner: LearnerGroup | None = None,
    ) -> None:
        self._config = config
        self._direct = direct_transfer(config, learner)
        self._budget = budget
        self._versions = Versions(config)
        self._pull_whole = self._asleep = self._to_wake = False
        place = learner.shared_place if learner else None
        small, prepare = ray.put(without_weights(files)), self._versions.pull_newest
        self._rollout = rollout_pool(config, small, self._budget, prepare, place=place)
        beside = learner.place if learner else None
        self._reward = reward_pool(config, (ray.put(statistics),), self._budget, beside)
        self._batches = Batches(
            config, self._rollout, self._reward, self._versions, greedy_baseline=greedy_baseline
        )
        if learner and config.rollout.colocate:
            learner.alone = self._aside
        self._recent: list[StepTimes] = []
        self._term_s: dict[str, float] = {}
        self.begin_step()

    def begin_step(self) -> float:
        """Begin to measure a step, and return when that is (time.perf_counter): start-up and
        evaluations, in which workers do other things, say nothing of how many sampling wants."""
        self._step_began, self._waited, self._sampling_s = time.perf_counter(), 0.0, 0.0
        return self._step_began

    def adapt(self) -> None:
        """End a step: grow or shrink by what the last ones measured."""
        seconds = time.perf_counter() - self._step_began
        times = StepTimes(seconds=seconds, waited=self._waited, sampling=self._sampling_s)
        self._take_what_came()
        # Steps of a pool that is changing say nothing of it.
        self._recent = [*self._recent, times][-WINDOW:] if self._rollout.settled else []
        most = self._config.rollout.max_workers
        wanted = wanted_workers(
            self._recent,
            self._rollout.wanted,
            parts=min(most, self._config.train.images_per_step),
            minimum=self._config.rollout.min_workers,
            maximum=most,
            overlaps=self._config.train.max_staleness > 0,
        )
        if wanted != self._rollout.wanted:
            self._recent = []
        self._rollout.resize(wanted)

    def _take_what_came(self) -> None:
        """Want no more workers than there are once the others did not come for too long: a pool
        that waits for them measures nothing, and would neither grow nor shrink any more."""
        ready, wanted = len(self._rollout.admit()), self._rollout.wanted
        limit_s = self._config.rollout.start_timeout_s
        enough = ready >= self._config.rollout.min_workers
        if self._rollout.longest_start_s > limit_s and enough:
            log.warning(
                "%d of %d rollout workers did not come within %g s (rollout.start_timeout_s); "
                "going on with %d",
                wanted - ready,
                wanted,
                limit_s,
                ready,
            )
            self._rollout.resize(ready)

    def heed(self, stop: StopRequest) -> None:
        """Wait for no worker any more once ``stop`` is requested."""
        self._rollout.stop = self._reward.stop = stop

    def wait(self) -> None:
        """Wait until the minimum of rollout workers is there."""
        self._rollout.wait()

    def publish(
        self, version: int, trained: Any, *, frozen: Any = None, source: Source | None = None
    ) -> None:
        """Have every rollout worker pull a version before its next batch.

        ``trained`` is a reference to the parameters that train, ``frozen`` to all parameters,
        given with the first version.  As many versions are kept as batches in flight may need.
        ``source`` made the references, and makes anew what is lost with its node.
        """
        workers, whole = self._rollout.constructed, self._pull_whole
        self._versions.publish(workers, version, trained, frozen, source=source, whole=whole)
        self._pull_whole = self._asleep = self._to_wake = False

    def sleep(self) -> None:
        """Have an engine that shares the learner's GPU leave it, until it gets the next version."""
        if not self._config.rollout.colocate:
            return
        while True:
            self._rollout.wait()
            # One that was lost on its way to sleep is replaced, and the other one is awake.
            if self._put_to_sleep():
                return

    def _put_to_sleep(self) -> bool:
        """Have every engine that is there leave the GPU; returns whether each of them did."""
        level, workers = self._config.sleep_level, self._rollout.constructed
        calls = [Call(worker, worker.actor.sleep.remote(level)) for worker in workers]
        self._versions.answers(self._rollout, calls)
        self._asleep = True
        return all(worker in self._rollout.constructed for worker in workers)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """While entered, an engine that shares the learner's GPU has left it; where it was there it
        comes back with the version that it had, if any.  It waits for no engine: one that is begun
        may be waiting for the learner's weights."""
        # One that is asleep already is woken too where an attempt before this put it to sleep and
        # then failed, which left out the end of this method.
        self._to_wake = self._to_wake or not self._asleep
        if not self._asleep:
            self._put_to_sleep()
        yield
        if self._to_wake:
            if self._versions.published:
                for worker in self._rollout.constructed:
                    self._versions.load(worker, self._versions.newest)
            self._asleep = self._to_wake = False

    def send(self, version: int, source: Source) -> bool:
        """Have every rollout worker hold the learner's weights, which are ``version``, without
        publishing them, as ``source`` can; returns whether they do, else they must be published."""
        if self._direct is None:
            return False
        sent = self._direct.send(self._rollout.constructed, version)
        if sent:
            self._versions.sent(version, source)
            self._asleep = self._to_wake = False
        self._pull_whole = not sent
        return sent

    def probe(self, version: int, canary: Canary, learner: Any) -> None:
        """Have every rollout worker score the canary with a version that was published;
        ``learner`` is a reference to the learner's log-probs.  RuntimeError at the next
        :meth:`confirm` of that version where one does not agree."""
        self._versions.probe(self._rollout.constructed, version, canary, learner)

    def show(self, version: int, weights: Weights) -> None:
        """Have every rollout worker hold this whole model, to caption with it."""
        ref = ray.put(weights)
        self.publish(version, ref, frozen=ref)
        self.confirm(version)

    def confirm(self, version: int) -> None:
        """Wait until the minimum of workers is there and each has pulled ``version`` and those
        before it, and agreed with the learner on the canary; one that does not answer is
        replaced."""
        self._rollout.wait()
        self._versions.confirm(self._rollout, version)

    def stage(self, prompts: Sequence[Prompt]) -> None:
        """See :meth:`Batches.stage`."""
        self._batches.stage(prompts)

    def submit(
        self,
        step: int,
        version: int,
        requests: Sequence[Request],
        *,
        before: Pending | None = None,
    ) -> Pending:
        """See :meth:`Batches.submit`."""
        return self._batches.submit(step, version, requests, before=before)

    def wait_rollouts(self, pending: Pending) -> None:
        """:meth:`Batches.wait_rollouts`, and until workers hold the batch's version."""
        started = time.perf_counter()
        self._batches.wait_rollouts(pending)
        self.confirm(pending.version)
        self._waited += time.perf_counter() - started

    def collect(self, pending: Pending) -> Parts:
        """The batch's results in the order of its requests, scored or dropped with a reason.
        Lost groups are sampled or scored again."""
        started = time.perf_counter()
        scored = self._batches.collect(pending)
        self._waited += time.perf_counter() - started
        self._sampling_s += sum(part.sampled.seconds for part in scored)
        for part in scored:
            for term, seconds in part.term_seconds.items():
                self._term_s[term] = self._term_s.get(term, 0.0) + seconds
        return Parts(
            prompts=[[request.prompt for request in s.requests] for s in pending.shares],
            scored=scored,
            references=[share.prompts for share in pending.shares],
        )

    def workers(self) -> dict[str, Any]:
        """The actors by name, ``rollout worker 0`` and so on."""
        pools = {"rollout worker": self._rollout, "reward worker": self._reward}
        return {
            f"{kind} {worker.number}": worker.actor
            for kind, pool in pools.items()
            for worker in pool.ready
        }

    def gauges(self, pending: Sequence[Pending]) -> dict[str, float]:
        """How many workers there are, and how far the batches after the one in training are."""
        sampled = [
            batch
            for batch in pending
            if not late_ones([share.rollout for share in batch.shares], 0.0)
        ]
        return {
            **(self._direct.metrics() if self._direct else {}),
            "workers/rollout": float(len(self._rollout.admit())),
            "workers/reward": float(len(self._reward.admit())),
            "workers/replaced": float(self._budget.spent),
            "queue/sampling": float(len(pending) - len(sampled)),
            "queue/sampled": float(len(sampled)),
        }

    def reward_seconds(self) -> dict[str, float]:
        """Seconds that each reward term has taken since the last call, over all reward workers."""
        taken, self._term_s = self._term_s, {}
        return {f"reward_seconds/{term}": seconds for term, seconds in taken.items()}

    def greedy(self, prompts: Sequence[Prompt], version: int) -> list[Completion]:
        """The arg-max captions of held-out prompts, in order."""
        parts = [part for part in split(list(prompts), self._config.rollout.max_workers) if part]
        sent = [self._send_greedy(i, part, version) for i, part in enumerate(parts)]
        captions: list[Completion] = []
        calls = self._batches.calls
        for i, part in enumerate(parts):
            while True:
                worker, ref = sent[i]
                try:
                    if calls.late([ref]):
                        raise GetTimeoutError(str(no_answer(calls.limit_s, "rollout.timeout_s")))
                    captions += ray.get(ref)
                    break
                except LOST as error:
                    self._versions.lost(self._rollout, worker, error)
                    sent[i] = self._send_greedy(i, part, version)
                finally:
                    calls.forget(ref)
        return captions

    def shutdown(self) -> None:
        """End every worker."""
        self._rollout.shutdown()
        self._reward.shutdown()

    def _send_greedy(self, i: int, part: list[Prompt], version: int) -> tuple[Worker, Any]:
        workers = self._rollout.wait()
        worker = workers[i % len(workers)]
        tokens = self._config.sampling.max_tokens
        ref = worker.actor.greedy.remote(part, tokens, version)
        self._batches.calls.add(ref, worker.number)
        return worker, ref
