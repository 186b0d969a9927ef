"""A pool of workers of one kind: started, replaced when they die, within a budget for the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

log = logging.getLogger(__name__)

LOST = (RayActorError, GetTimeoutError)
"""What a call to a worker raises that died or does not answer."""


class RestartBudget:
    """Counts the workers that a run has replaced; past ``limit`` the first cause is raised."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._first_cause: Exception | None = None
        self.spent = 0

    def spend(self, who: str, cause: Exception) -> None:
        """Count one replacement; RuntimeError, from the first cause, when there are too many."""
        self._first_cause = self._first_cause or cause
        self.spent += 1
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        log.warning("%s was lost and is replaced: %s", who, reason)
        if self.spent > self._limit:
            raise RuntimeError(
                f"{self.spent} workers were lost, rollout.max_restarts allows "
                f"{self._limit}; the first cause follows"
            ) from self._first_cause


class Pool:
    """``size`` actors that ``start`` makes; ``name`` is what messages call one of them."""

    def __init__(
        self, name: str, start: Callable[[], Any], size: int, budget: RestartBudget
    ) -> None:
        self._name, self._start, self._budget = name, start, budget
        self.actors = [start() for _ in range(size)]

    def __len__(self) -> int:
        return len(self.actors)

    def replace(self, i: int, cause: Exception) -> Any:
        """A new worker in place of a lost one."""
        raise_unless_lost(self.actors[i], cause)
        self._budget.spend(f"{self._name} {i}", cause)
        ray.kill(self.actors[i])
        self.actors[i] = self._start()
        return self.actors[i]

    def shutdown(self) -> None:
        """End every worker."""
        for actor in self.actors:
            ray.kill(actor)


def raise_unless_lost(actor: Any, error: Exception) -> None:
    """Raise what replacing ``actor`` would not mend: an error in its construction, which would
    come again, or the loss of another actor whose result it was waiting for."""
    if isinstance(error, RayActorError):
        other = error.actor_id is not None and error.actor_id != actor._actor_id.hex()
        if error.actor_init_failed or other:
            raise error
