"""The weight versions of a run, which rollout workers pull from the object store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import ray

from rayrl.actors.losses import LOST
from rayrl.actors.pool import Pool, Worker
from rayrl.canary import Canary, check_agreement
from rayrl.config import Config


class Call(NamedTuple):
    """Something that a worker was asked to do."""

    worker: Worker
    ref: Any


class _Load(NamedTuple):
    """A version on its way to a worker."""

    worker: Worker
    version: int
    ref: Any


class _OnDemand(NamedTuple):
    """A version that every worker was sent, and that is published when another one needs it."""

    publish: Callable[[], Any]


class _Probe(NamedTuple):
    """The canary on its way to a worker."""

    worker: Worker
    version: int
    ref: Any
    learner: Any


_Sent = TypeVar("_Sent", Call, _Load, _Probe)


class Versions:
    """Published versions, and which of them are on their way to a worker.

    As many stay pullable as batches in flight may need, and one more.
    """

    def __init__(self, config: Config) -> None:
        self._changed = config.model.trainable
        self._keep = config.train.max_staleness + 2
        self._timeout_s = config.rollout.timeout_s
        self._tolerance = config.canary_tolerance
        self._frozen: Any = None
        self._trained: dict[int, Any] = {}
        self._loads: list[_Load] = []
        self._probes: list[_Probe] = []

    @property
    def newest(self) -> int:
        """The version that was published last."""
        return max(self._trained)

    def publish(
        self,
        workers: Sequence[Worker],
        version: int,
        trained: Any,
        frozen: Any,
        *,
        whole: bool = False,
    ) -> None:
        """Have ``workers`` pull a version.  ``frozen`` is a reference to all parameters with the
        first version, else None; it stays, so that new workers can be given the rest, and those
        that can have kept nothing (``whole``)."""
        if frozen is not None:
            self._frozen = frozen
            self._trained.clear()
        self._remember(version, trained)
        for worker in workers:
            refs = (trained,) if frozen is None and not whole else (self._frozen, trained)
            ref = worker.actor.load.remote(self._changed, *refs)
            self._loads.append(_Load(worker, version, ref))

    def sent(self, version: int, publish: Callable[[], Any]) -> None:
        """Every worker holds ``version`` already; ``publish`` returns a reference to the parameters
        that train, as long as no version follows."""
        self._remember(version, _OnDemand(publish))

    def _remember(self, version: int, trained: Any) -> None:
        kept = {v: ref for v, ref in self._trained.items() if not isinstance(ref, _OnDemand)}
        kept[version] = trained
        self._trained = {v: kept[v] for v in sorted(kept)[-self._keep :]}

    def pull(self, actor: Any, version: int) -> Any:
        """Have an actor pull a version, as if it had none; returns the reference."""
        trained = self._trained[version]
        if isinstance(trained, _OnDemand):
            trained = self._trained[version] = trained.publish()
        return actor.load.remote(self._changed, self._frozen, trained)

    def pull_newest(self, actor: Any) -> Any:
        """The same with the newest version; None where nothing was published yet."""
        return self.pull(actor, self.newest) if self._trained else None

    def load(self, worker: Worker, version: int) -> None:
        """Have a worker pull a version, to be confirmed like those that were published."""
        self._loads.append(_Load(worker, version, self.pull(worker.actor, version)))

    def probe(self, workers: Sequence[Worker], version: int, canary: Canary, learner: Any) -> None:
        """Have ``workers`` score the canary with a version that they have been told to pull.
        ``learner`` is a reference to the learner's log-probs."""
        shared = ray.put(canary)
        for worker in workers:
            ref = worker.actor.score.remote(shared, version)
            self._probes.append(_Probe(worker, version, ref, learner))

    def confirm(self, pool: Pool, version: int) -> None:
        """Wait until each worker of ``pool`` has pulled ``version`` and those before it, and has
        scored the canary as the learner does; one that does not answer is replaced."""
        loads = [load for load in self._loads if load.version <= version]
        self._loads = [load for load in self._loads if load.version > version]
        for load, held in self.answers(pool, loads):
            if held not in (None, load.version):
                raise RuntimeError(
                    f"rollout worker {load.worker.number} holds version {held}, want {load.version}"
                )
        probes = [probe for probe in self._probes if probe.version <= version]
        self._probes = [probe for probe in self._probes if probe.version > version]
        for probe, scored in self.answers(pool, probes):
            if scored is not None:
                check_agreement(
                    scored,
                    ray.get(probe.learner),
                    who=f"rollout worker {probe.worker.number}",
                    version=probe.version,
                    tolerance=self._tolerance,
                )

    def answers(self, pool: Pool, sent: Sequence[_Sent]) -> list[tuple[_Sent, Any]]:
        """What workers that were not replaced by now answer within ``rollout.timeout_s``; None for
        one that does not, which is replaced for it."""
        there = set(map(id, pool.constructed))
        sent = [one for one in sent if id(one.worker) in there]
        refs = [one.ref for one in sent]
        if not refs:
            return []
        _, late = ray.wait(refs, num_returns=len(refs), timeout=self._timeout_s)
        if not late:
            try:
                # One call for all takes a fraction of the time of a call for each.
                return list(zip(sent, ray.get(refs), strict=True))
            except LOST:
                pass
        return [(one, self._answer(pool, one.worker, one.ref)) for one in sent]

    def _answer(self, pool: Pool, worker: Worker, ref: Any) -> Any:
        """What a worker has answered; None where it was replaced by now, or is for not
        answering."""
        if worker not in pool.constructed:
            return None
        try:
            return ray.get(ref, timeout=_NO_LONGER_S)
        except LOST as error:
            pool.lost(worker, error)
            return None


_NO_LONGER_S = 0.1
"""For an answer that has been waited for already."""
