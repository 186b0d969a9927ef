"""Weights straight from the learner's memory into the engines', past the object store.

A version is staged in buckets by the learner, which every engine then receives at the same time
(:mod:`rayrl.transport`).  All ends must be there at once, so a group of them is built anew whenever
a worker comes, leaves or dies; and whatever goes wrong, within a time limit, engines pull the same
version from the object store instead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from rayrl.actors.learner_group import LearnerGroup
from rayrl.actors.pool import Worker
from rayrl.config import Config
from rayrl.transport import Meeting

log = logging.getLogger(__name__)

_GIVE_UP_AFTER = 3
"""Failures in a row after which a run pulls to its end: a network that does not carry a transfer
would cost the time limit at every step."""
_MARGIN_S = 10.0
"""Ends give up by themselves at the time limit; how much later they count as not answering."""


class DirectTransfer:
    """Sends versions from ``learner`` to engines by ``rollout.sync``.

    fallbacks: versions that had to be pulled instead
    """

    def __init__(self, config: Config, learner: LearnerGroup) -> None:
        self._kind = config.rollout.sync
        self._limit_s = config.rollout.sync_timeout_s
        self._changed = config.model.trainable
        self._asleep, self._whole = config.rollout.colocate, config.sleep_level == 2
        self._learner = learner
        self._members: list[Any] = []
        self._store: Any = None
        self._failures = 0
        self.fallbacks = 0

    def send(self, workers: Sequence[Worker], version: int) -> bool:
        """Have every worker hold the learner's current version, which is ``version``; returns
        whether they do, else they must pull it whole, for what they hold is not known."""
        if self._failures == _GIVE_UP_AFTER:
            return False
        try:
            self._learner.stage(trained_only=not self._whole)
            ends = [self._learner.first, *(worker.actor for worker in workers)]
            if ends != self._members:
                self._meet(ends)
            self._pass_on(ends)
        except RayError as error:
            self._fall_back(version, error)
            return False
        self._failures = 0
        return True

    def metrics(self) -> dict[str, float]:
        """What a step's metrics say of transfers."""
        return {"sync/fallbacks": float(self.fallbacks)}

    def _meet(self, ends: Sequence[Any]) -> None:
        from rayrl.learner.parallel import open_store

        self._members = []
        address = ray.util.get_node_ip_address()
        self._store = open_store(address, len(ends), timeout_s=self._limit_s)
        meeting = Meeting(
            kind=self._kind,
            address=address,
            port=self._store.port,
            size=len(ends),
            timeout_s=self._limit_s,
        )
        self._all([end.join_transfer.remote(meeting, rank) for rank, end in enumerate(ends)])
        self._members = list(ends)

    def _pass_on(self, ends: Sequence[Any]) -> None:
        learner, *engines = ends
        manifest, sent = learner.offer.remote(), learner.send.remote()
        self._all([sent, *(end.receive.remote(self._changed, manifest) for end in engines)])
        self._all([learner.release.remote()])
        if self._asleep:
            self._all([end.wake.remote() for end in engines])

    def _all(self, answers: list[Any]) -> None:
        """Wait for all answers; raises the first error among them."""
        limit = self._limit_s + _MARGIN_S
        done, _ = ray.wait(answers, num_returns=len(answers), timeout=limit, fetch_local=False)
        # An end that failed knows why; one that is silent does not.
        for answer in sorted(answers, key=lambda answer: answer not in done):
            ray.get(answer, timeout=_MARGIN_S if answer in done else 0)

    def _fall_back(self, version: int, error: RayError) -> None:
        self._members = []
        self._learner.first.release.remote()
        self._failures += 1
        self.fallbacks += 1
        again = "and every later one" if self._failures == _GIVE_UP_AFTER else "and no other"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        log.warning(
            "version %d did not go through %s: %s; engines pull it %s",
            version,
            self._kind,
            lines[-1],
            again,
        )


def direct_transfer(config: Config, learner: LearnerGroup | None) -> DirectTransfer | None:
    """What ``rollout.sync`` asks for; None where engines always pull."""
    if learner is None or config.rollout.sync == "pull":
        return None
    return DirectTransfer(config, learner)
