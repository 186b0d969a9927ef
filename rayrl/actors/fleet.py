"""The workers of a run: rollout and reward actors that are replaced when they die.

The driver submits every batch and every weight version itself, and Ray runs one caller's calls on
an actor in the order of submission, so which version samples which batch is exact by construction.
A replaced worker pulls the version that its lost batch was to be sampled with, samples the very
same groups again (seeds belong to prompts), and then catches up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import ray

from rayrl.actors.pool import LOST, Pool, RestartBudget
from rayrl.actors.reward import RewardActor
from rayrl.actors.rollout import RolloutActor
from rayrl.config import Config
from rayrl.engine.base import Sampling
from rayrl.objectives import build
from rayrl.rewards.score import Dropped
from rayrl.rewards.statistics import Statistics, step_document_frequency
from rayrl.rounds import Request
from rayrl.types import Completion, Prompt, ScoredGroup
from rayrl.weights import ModelFiles, Weights

_Item = TypeVar("_Item")


@dataclass
class _Share:
    """One worker's part of a batch."""

    worker: int
    requests: list[Request]
    actor: Any = None
    rollout: Any = None
    scored: Any = None


class _Load(NamedTuple):
    """A version on its way to a worker; void once that worker was replaced."""

    worker: int
    actor: Any
    version: int
    ref: Any


@dataclass
class Pending:
    """A batch on its way: sampled with ``version``, then scored, under ``reward.df: batch``
    against the document frequencies ``df`` of all its prompts."""

    step: int
    version: int
    df: Any = None
    shares: list[_Share] = field(default_factory=list)


class Fleet:
    """Rollout and reward workers and the weight versions they pull.

    ``files`` are the model's files, ``statistics`` what rewards are scored against.  The restart
    budget is the run's: past it, the first cause is raised.
    """

    def __init__(
        self, config: Config, files: ModelFiles, statistics: Statistics, *, greedy_baseline: bool
    ) -> None:
        self._config = config
        self._files = ray.put(files)
        self._statistics = (ray.put(statistics),)
        self._sampling = Sampling(
            group_size=config.train.group_size,
            temperature=config.sampling.temperature,
            max_tokens=config.sampling.max_tokens,
            greedy_baseline=greedy_baseline,
        )
        self._budget = RestartBudget(config.rollout.max_restarts)
        self._rollout = Pool(
            "rollout worker", self._start_rollout, config.rollout.num_workers, self._budget
        )
        self._reward = Pool(
            "reward worker", self._start_reward, config.train.reward_workers, self._budget
        )
        self._frozen: Any = None
        self._versions: dict[int, Any] = {}
        self._loads: list[_Load] = []

    @property
    def restarts(self) -> int:
        """Workers that were replaced so far."""
        return self._budget.spent

    def publish(self, version: int, trained: Any, *, frozen: Any = None) -> None:
        """Have every rollout worker pull a version before its next batch.

        ``trained`` is a reference to the parameters that train, ``frozen`` to all parameters,
        given with the first version.  As many versions are kept as batches in flight may need.
        """
        if frozen is not None:
            self._frozen = frozen
            self._versions.clear()
        self._versions[version] = trained
        for old in sorted(self._versions)[: -self._config.train.max_staleness - 2]:
            del self._versions[old]
        changed = self._config.model.trainable
        for i, worker in enumerate(self._rollout.actors):
            refs = (self._frozen, trained) if frozen is not None else (trained,)
            self._loads.append(_Load(i, worker, version, worker.load.remote(changed, *refs)))

    def show(self, version: int, weights: Weights) -> None:
        """Have every rollout worker hold this whole model, to caption with it."""
        ref = ray.put(weights)
        self.publish(version, ref, frozen=ref)
        self.confirm(version)

    def confirm(self, version: int) -> None:
        """Wait until every worker has pulled ``version`` and those before it; a worker that does
        not answer is replaced."""
        due = [load for load in self._loads if load.version <= version]
        self._loads = [load for load in self._loads if load.version > version]
        for load in due:
            if load.actor is not self._rollout.actors[load.worker]:
                continue
            try:
                held = ray.get(load.ref, timeout=self._config.rollout.timeout_s)
            except LOST as error:
                self._rollout.replace(load.worker, error)
                self._load(load.worker, max(self._versions))
                continue
            if held != load.version:
                raise RuntimeError(
                    f"rollout worker {load.worker} holds version {held}, want {load.version}"
                )

    def submit(
        self,
        step: int,
        version: int,
        requests: Sequence[Request],
        *,
        before: Pending | None = None,
    ) -> Pending:
        """Send a round of a step to be sampled with ``version`` and scored; does not wait.

        ``before`` is the step's round before: document frequencies stay those of the first, so that
        the captions of a group are scored alike."""
        references = {r.prompt.prompt_id: r.prompt.references for r in requests}
        df = (
            before.df
            if before
            else ray.put(step_document_frequency(references, self._config.reward))
        )
        pending = Pending(step=step, version=version, df=df)
        for i, part in enumerate(_split(list(requests), len(self._rollout))):
            if part:
                share = _Share(worker=i, requests=part)
                self._send(share, pending)
                pending.shares.append(share)
        return pending

    def wait_rollouts(self, pending: Pending) -> None:
        """Wait until every group of a batch is sampled, without fetching it: groups go from
        worker to worker.  A worker that takes too long is replaced."""
        for share in pending.shares:
            limit = self._config.rollout.timeout_s
            while not ray.wait([share.rollout], timeout=limit, fetch_local=False)[0]:
                self._sample_again(share, pending, TimeoutError(f"no answer within {limit} s"))
        self.confirm(pending.version)

    def collect(self, pending: Pending) -> list[ScoredGroup | Dropped]:
        """The batch's results in the order of its requests, scored or dropped with a reason.
        Lost groups are sampled or scored again."""
        results: list[ScoredGroup | Dropped] = []
        for share in pending.shares:
            while True:
                try:
                    results += ray.get(share.scored, timeout=self._config.train.reward_timeout_s)
                    break
                except LOST as error:
                    self._recover(share, pending, error)
        return results

    def workers(self) -> dict[str, Any]:
        """The actors by name, ``rollout worker 0`` and so on."""
        pools = {"rollout worker": self._rollout, "reward worker": self._reward}
        return {
            f"{kind} {i}": actor
            for kind, pool in pools.items()
            for i, actor in enumerate(pool.actors)
        }

    def gauges(self, pending: Sequence[Pending]) -> dict[str, float]:
        """How many workers there are, and how far the batches after the one in training are."""
        sampled = [
            batch
            for batch in pending
            if not ray.wait(
                [share.rollout for share in batch.shares],
                num_returns=len(batch.shares),
                timeout=0,
                fetch_local=False,
            )[1]
        ]
        return {
            "workers/rollout": float(len(self._rollout)),
            "workers/reward": float(len(self._reward)),
            "workers/replaced": float(self.restarts),
            "queue/sampling": float(len(pending) - len(sampled)),
            "queue/sampled": float(len(sampled)),
        }

    def reward_seconds(self) -> dict[str, float]:
        """Seconds that each reward term has taken since the last call, over all reward workers;
        a worker that died in between took its count along."""
        seconds: dict[str, float] = {}
        for ref in [worker.take_seconds.remote() for worker in self._reward.actors]:
            try:
                taken = ray.get(ref, timeout=self._config.train.reward_timeout_s)
            except LOST:
                continue
            for term, value in taken.items():
                name = f"reward_seconds/{term}"
                seconds[name] = seconds.get(name, 0.0) + value
        return seconds

    def _recover(self, share: _Share, pending: Pending, error: Exception) -> None:
        """Redo what was lost of a share: its groups, or only their scores."""
        try:
            ray.get(share.rollout, timeout=self._config.rollout.timeout_s)
        except LOST as lost:
            self._sample_again(share, pending, lost)
        else:
            actor = self._reward.replace(self._scorer(share, pending), error)
            share.scored = actor.score.remote(share.rollout, pending.df)

    def greedy(self, prompts: Sequence[Prompt], version: int) -> list[Completion]:
        """The arg-max captions of held-out prompts, in order."""
        parts = _split(list(prompts), len(self._rollout))
        tokens = self._config.sampling.max_tokens
        refs = [
            worker.greedy.remote(part, tokens, version)
            for worker, part in zip(self._rollout.actors, parts, strict=True)
        ]
        captions: list[Completion] = []
        for i, part in enumerate(parts):
            while True:
                try:
                    captions += ray.get(refs[i], timeout=self._config.rollout.timeout_s)
                    break
                except LOST as error:
                    actor = self._rollout.replace(i, error)
                    self._load(i, version)
                    refs[i] = actor.greedy.remote(part, tokens, version)
        return captions

    def shutdown(self) -> None:
        """End every worker."""
        self._rollout.shutdown()
        self._reward.shutdown()

    def _send(self, share: _Share, pending: Pending) -> None:
        share.actor = self._rollout.actors[share.worker]
        share.rollout = share.actor.generate.remote(share.requests, self._sampling, pending.version)
        reward = self._reward.actors[self._scorer(share, pending)]
        share.scored = reward.score.remote(share.rollout, pending.df)

    def _scorer(self, share: _Share, pending: Pending) -> int:
        """Which reward worker scores a share: they take turns."""
        return (pending.step + share.worker) % len(self._reward)

    def _sample_again(self, share: _Share, pending: Pending, cause: Exception) -> None:
        """Sample a lost share with its own version; the worker then returns to the newest."""
        if share.actor is self._rollout.actors[share.worker]:
            self._rollout.replace(share.worker, cause)
        self._load(share.worker, pending.version)
        self._send(share, pending)
        self._load(share.worker, max(self._versions))

    def _load(self, i: int, version: int) -> None:
        actor = self._rollout.actors[i]
        ref = actor.load.remote(self._config.model.trainable, self._frozen, self._versions[version])
        self._loads.append(_Load(i, actor, version, ref))

    def _start_rollout(self) -> Any:
        rollout = self._config.rollout
        threads = str(max(1, int(rollout.cpus)))
        return RolloutActor.options(  # type: ignore[attr-defined]
            num_cpus=rollout.cpus,
            num_gpus=rollout.gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        ).remote(
            self._files,
            self._config.engine,
            self._config.train.group_size,
            self._config.model.trust_remote_code,
        )

    def _start_reward(self) -> Any:
        return RewardActor.options(  # type: ignore[attr-defined]
            num_cpus=self._config.train.reward_cpus
        ).remote(
            self._config.reward,
            self._statistics,
            self._config.train.reward_timeout_s,
            build(self._config.objective).needs,
        )


def _split(items: list[_Item], parts: int) -> list[list[_Item]]:
    """Contiguous parts of nearly equal size, so that concatenating them restores the order."""
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]
