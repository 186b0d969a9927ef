"""A pool of workers of one kind: started, admitted when ready, drained, replaced when they die.

A worker asks Ray for its resources when it is started, so that a cluster that grows by itself sees
the demand.  It is admitted (gets work) once its construction is done and what ``prepare`` submitted
to it has come back; until then the pool does not wait for it, unless it has fewer ready workers
than its minimum.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from rayrl.actors.losses import LOST, raise_unless_lost
from rayrl.interrupt import StopRequest
from rayrl.scaling import shortage

log = logging.getLogger(__name__)

SAY_EVERY_S = 30.0
_MOST_RENEWALS = 4
"""Times in a row that a worker is prepared again: two objects can be lost with a node, and another
node while they are made again."""


class TooFewWorkers(RuntimeError):
    """A pool stayed below its minimum for longer than it may."""


class TooManyLost(RuntimeError):
    """A run has lost more workers than it may."""


class RestartBudget:
    """Counts the workers that a run has replaced; past ``limit`` the first cause is raised."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._first_cause: Exception | None = None
        self._first = ""
        self.spent = 0

    def spend(self, what: str, cause: Exception) -> None:
        """Count one loss; TooManyLost, from the first cause, when there were too many."""
        # Where it was raised there may be gigabytes in hand.
        self._first_cause = self._first_cause or cause.with_traceback(None)
        self._first = self._first or f"{what}: {_first_line(cause)}"
        self.spent += 1
        log.warning("%s: %s", what, _first_line(cause))
        if self.spent > self._limit:
            raise TooManyLost(
                f"{self.spent} workers were lost, rollout.max_restarts allows {self._limit}; "
                f"the first cause: {self._first}"
            ) from self._first_cause


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """``wanted`` workers, of which ``minimum`` are enough to go on; with fewer the pool waits for
    up to ``deadline_s``.  Each asks Ray for ``asked`` (resource to amount)."""

    wanted: int
    minimum: int
    deadline_s: float
    asked: Mapping[str, float]


@dataclass(eq=False)
class Worker:
    """An actor of a pool.  ``due`` is what it must have done before its next stage; it was
    ``renewed`` so often since it was last ready.  ``charged`` is when a loss of its results was
    counted, ``begun`` when it was started or prepared again (time.monotonic)."""

    number: int
    actor: Any
    due: Any
    constructed: bool = False
    renewed: int = 0
    charged: float | None = None
    begun: float = 0.0


class Pool:
    """Workers that ``start`` makes.  ``name`` is what messages call one of them; ``prepare``
    submits to a constructed actor what it needs before it is admitted and returns the reference,
    or None when it needs nothing; where something of that was lost before, it is given the error
    too.  Its workers are started at once, or with the first :meth:`wait` where ``begin`` is
    False."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Any],
        size: PoolSize,
        budget: RestartBudget,
        *,
        prepare: Callable[[Any, ObjectLostError | None], Any] = lambda actor, lost: None,
        begin: bool = True,
    ) -> None:
        self._name, self._start, self._prepare = name, start, prepare
        self._size, self._budget = size, budget
        self._next_number = 0
        self._one_could = False
        self._starting: list[Worker] = []
        self._ready: list[Worker] = []
        self._leaving: list[Worker] = []
        self.wanted = size.wanted
        self.stop = StopRequest()
        if begin:
            self._fill()

    @property
    def constructed(self) -> list[Worker]:
        """The workers that must hear of every new version: the ready ones and those that are about
        to be."""
        return [*self._ready, *(worker for worker in self._starting if worker.constructed)]

    @property
    def ready(self) -> list[Worker]:
        """Those that were admitted until now."""
        return list(self._ready)

    @property
    def settled(self) -> bool:
        """Whether all wanted workers are ready."""
        return len(self._ready) == self.wanted

    @property
    def longest_start_s(self) -> float:
        """For how long the worker that takes longest to be ready has been starting; 0 without."""
        now = time.monotonic()
        return max((now - worker.begun for worker in self._starting), default=0.0)

    def admit(self) -> list[Worker]:
        """Admit whoever is ready by now; returns all ready workers, the longest serving first."""
        for worker in list(self._starting):
            while worker in self._starting and ray.wait([worker.due], timeout=0)[0]:
                self._advance(worker)
        return list(self._ready)

    def wait(self) -> list[Worker]:
        """The ready workers, at least the minimum.

        Waits for those that are missing and says every 30 s why; TooFewWorkers at the deadline,
        and once :attr:`stop` is requested.
        """
        self._fill()
        began = said = time.monotonic()
        while len(self.admit()) < self._size.minimum:
            now = time.monotonic()
            if now - began > self._size.deadline_s:
                raise TooFewWorkers(f"{self._situation()}; gave up after {now - began:.0f} s")
            if self.stop.requested:
                raise TooFewWorkers(f"{self._situation()}; asked to stop meanwhile")
            if now - said >= SAY_EVERY_S:
                said = now
                log.warning("%s", self._situation())
            ray.wait([w.due for w in self._starting], timeout=min(1.0, self._size.deadline_s))
        return list(self._ready)

    def lost(self, worker: Worker, cause: Exception, *, sent: float = math.inf) -> None:
        """Replace a worker, once, however many of its results were lost with it.  ``sent`` is when
        it was asked for what is lost (time.monotonic): what was on its way when a loss was counted
        went with the same node.

        Raises what replacing it would not mend, and TooManyLost when the budget is spent.
        """
        raise_unless_lost(worker.actor, cause, one_could=self._one_could)
        if not isinstance(cause, ObjectLostError):
            self._replace(worker, cause)
        elif worker.charged is None or worker.charged < sent:
            # A result is gone and not the worker, as far as this tells.
            worker.charged = time.monotonic()
            self._budget.spend(f"a result of {self._name} {worker.number} was lost", cause)

    def renew(self, worker: Worker, cause: ObjectLostError) -> None:
        """Prepare a worker of :attr:`constructed` again, for something that was on its way to it
        was lost.  It then counts as another one: what it was asked for until now may go wrong."""
        if worker.renewed == _MOST_RENEWALS:
            self._replace(worker, cause)
            return
        log.warning("%s %d is prepared again: %s", self._name, worker.number, _first_line(cause))
        due = self._prepare(worker.actor, cause)
        if worker not in self.constructed:
            return  # lost while the learner made again what it is to get
        state = self._ready if worker in self._ready else self._starting
        state.remove(worker)
        again = replace(worker, due=due, renewed=worker.renewed + 1, begun=time.monotonic())
        self._starting.append(again)

    def resize(self, wanted: int) -> None:
        """Start workers, or let some go: those that are not ready yet at once, others when they
        have finished what they were given."""
        self.wanted = wanted
        self._fill()
        while len(self._starting) + len(self._ready) > wanted:
            if self._starting:
                ray.kill(self._starting.pop().actor)
            else:
                worker = self._ready.pop()
                # Calls are served in order, so this one comes after all its work.
                worker.due = worker.actor.leave.remote()
                self._leaving.append(worker)
        self._leaving = [w for w in self._leaving if not ray.wait([w.due], timeout=0)[0]]

    def shutdown(self) -> None:
        """End every worker."""
        for worker in [*self._ready, *self._starting, *self._leaving]:
            ray.kill(worker.actor)

    def _replace(self, worker: Worker, cause: Exception) -> None:
        if worker in self._leaving:
            self._leaving.remove(worker)
            ray.kill(worker.actor)
        for state in (self._ready, self._starting):
            if worker in state:
                state.remove(worker)
                ray.kill(worker.actor)
                said = f"{self._name} {worker.number} was lost and is replaced"
                if worker.charged is None:
                    self._budget.spend(said, cause)
                else:
                    log.warning("%s: %s", said, _first_line(cause))
        self._fill()

    def _fill(self) -> None:
        while len(self._starting) + len(self._ready) < self.wanted:
            actor = self._start()
            due, begun = actor.started.remote(), time.monotonic()
            self._starting.append(Worker(self._next_number, actor, due, begun=begun))
            self._next_number += 1

    def _advance(self, worker: Worker) -> None:
        """One stage further: constructed, prepared, ready."""
        try:
            ray.get(worker.due)
        except LOST as error:
            if worker.constructed and isinstance(error, ObjectLostError):
                self.renew(worker, error)
            else:
                raise_unless_lost(worker.actor, error, one_could=self._one_could)
                self._replace(worker, error)
            return
        if not worker.constructed:
            worker.constructed = self._one_could = True
            worker.due = self._prepare(worker.actor, None)
            if worker.due is not None:
                return
        worker.renewed = 0
        self._starting.remove(worker)
        self._ready.append(worker)

    def _situation(self) -> str:
        pulling = any(worker.constructed for worker in self._starting)
        total, free = ray.cluster_resources(), ray.available_resources()
        missing = shortage(self._size.asked, total, free)
        if all(total.get(name, 0.0) >= amount for name, amount in self._size.asked.items()):
            missing += ", unless it has what it asks for and is still being constructed"
        return (
            f"{len(self._ready)} {self._name}s are ready, want at least {self._size.minimum}: "
            f"{'one pulls its weights' if pulling else missing}"
        )


def _first_line(error: Exception) -> str:
    # What a worker raised comes with a trace that begins elsewhere.
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, Exception) else error
    return str(error).splitlines()[0] if str(error) else type(error).__name__
