"""The weight versions of a run, which rollout workers pull from the object store."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import ray
from ray.exceptions import ObjectLostError

from rayrl.actors.losses import LOST, OtherVersion
from rayrl.actors.pool import Pool, Worker
from rayrl.canary import Canary, check_agreement
from rayrl.config import Config

log = logging.getLogger(__name__)


class Source(Protocol):
    """Who publishes versions: a :class:`LearnerGroup`."""

    def weights(self, *, trained_only: bool) -> Any:
        """A reference to the parameters of its version, those that train or all."""

    def earlier(self, version: int) -> Any:
        """A reference to those that train of an earlier version; None where it cannot go back."""


class VersionLost(RuntimeError):
    """Captions of a version are wanted that no node holds any more, nor the learner can make."""


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

    As many stay pullable as batches in flight may need, and one more.  They lie on the learner's
    node and wherever they were pulled to.  What is lost with those nodes is published again by the
    learner, whose version is the newest; it is built anew for an older one.  One that is older than
    all checkpoints that are left is gone: VersionLost is raised when somebody needs it.
    """

    def __init__(self, config: Config) -> None:
        self._changed = config.model.trainable
        self._keep = config.train.max_staleness + 2
        self._timeout_s = config.rollout.timeout_s
        self._tolerance = config.canary_tolerance
        self._frozen: Any = None
        self._trained: dict[int, Any] = {}
        self._source: Source | None = None
        self._gone: set[int] = set()
        self._loads: list[_Load] = []
        self._probes: list[_Probe] = []

    @property
    def published(self) -> bool:
        """Whether any version was."""
        return bool(self._trained)

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
        source: Source | None,
        whole: bool = False,
    ) -> None:
        """Have ``workers`` pull a version.  ``frozen`` is a reference to all parameters with the
        first version, else None; it stays, so that new workers can be given the rest, and those
        that can have kept nothing (``whole``).  ``source`` has this version until another one
        follows; it is None where nothing can be lost, for the driver made the objects."""
        if frozen is not None:
            self._frozen = frozen
            self._trained.clear()
            self._gone.clear()
        self._remember(version, trained, source)
        for worker in workers:
            refs = (trained,) if frozen is None and not whole else (self._frozen, trained)
            ref = worker.actor.load.remote(self._changed, *refs)
            self._loads.append(_Load(worker, version, ref))

    def sent(self, version: int, source: Source) -> None:
        """Every worker holds ``version`` already, which ``source`` has until another one follows
        and can publish."""
        self._remember(version, _OnDemand(partial(source.weights, trained_only=True)), source)

    def _remember(self, version: int, trained: Any, source: Source | None) -> None:
        self._source = source
        kept = {v: ref for v, ref in self._trained.items() if not isinstance(ref, _OnDemand)}
        kept[version] = trained
        self._trained = {v: kept[v] for v in sorted(kept)[-self._keep :]}

    def pull(self, actor: Any, version: int) -> Any:
        """Have an actor pull a version, as if it had none; returns the reference."""
        if version in self._gone:
            raise VersionLost(
                f"weights of version {version} were lost with a node, and captions of them are to "
                f"be sampled; the learner, at version {self.newest}, has no checkpoint left from "
                "before them (train.keep_checkpoints)"
            )
        trained = self._trained[version]
        if isinstance(trained, _OnDemand):
            trained = self._trained[version] = trained.publish()
        return actor.load.remote(self._changed, self._frozen, trained)

    def pull_newest(self, actor: Any, lost: ObjectLostError | None) -> Any:
        """The same with the newest version; None where nothing was published yet.  ``lost`` is why
        the actor could not pull what it was to."""
        if lost is not None:
            self._publish_again(lost)
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
        """What a worker has answered; None where it was replaced by now, or is for not answering,
        or pulls the newest version for having missed one."""
        if worker not in pool.constructed:
            return None
        try:
            return ray.get(ref, timeout=_NO_LONGER_S)
        except ObjectLostError as error:
            # Answers are small and with the driver; so it is what the worker was given.
            pool.renew(worker, error)
        except LOST as error:
            self.lost(pool, worker, error)
        return None

    def lost(self, pool: Pool, worker: Worker, cause: Exception, *, sent: float = math.inf) -> None:
        """:meth:`Pool.lost`, but one that refused for having missed a version pulls the newest.
        A refusal that no lost object explains is raised."""
        if not isinstance(cause, OtherVersion) or worker not in pool.constructed:
            pool.lost(worker, cause, sent=sent)
        elif (missed := self._missed(worker)) is not None:
            pool.renew(worker, missed)
        else:
            raise cause

    def _missed(self, worker: Worker) -> ObjectLostError | None:
        """Why a version that a worker was to pull did not reach it."""
        for load in self._loads:
            if load.worker is worker:
                try:
                    ray.get(load.ref, timeout=_NO_LONGER_S)
                except ObjectLostError as error:
                    return error
                except LOST:
                    continue
        return None

    def _publish_again(self, lost: ObjectLostError) -> None:
        """Have the object made again that was lost, unless it was since; or remember that this
        cannot be done."""
        if self._source is None:
            raise lost
        which = lost.object_ref_hex
        if _is(self._frozen, which):
            log.warning("all weights were lost with a node and are published again")
            self._frozen = self._source.weights(trained_only=False)
        for version in [v for v, ref in self._trained.items() if _is(ref, which)]:
            log.warning("version %d was lost with a node and is published again", version)
            if version == self.newest:
                self._trained[version] = self._source.weights(trained_only=True)
            elif (again := self._source.earlier(version)) is not None:
                self._trained[version] = again
            else:
                self._gone.add(version)


def _is(ref: Any, which: str) -> bool:
    return isinstance(ref, ray.ObjectRef) and ref.hex() == which


_NO_LONGER_S = 0.1
"""For an answer that has been waited for already."""
