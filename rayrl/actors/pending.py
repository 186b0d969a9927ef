"""A batch on its way, in the parts that workers sample and score."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray

from rayrl.planning import Request
from rayrl.shares import Scored

_Item = TypeVar("_Item")


@dataclass
class Share:
    """A part of a batch, from its request ``first`` on, and who samples and scores it; ``prompts``
    is a reference to the requests' prompts, with the images, ``result`` what became of them; they
    were sent at these times (time.monotonic)."""

    index: int
    first: int
    requests: list[Request]
    prompts: Any
    worker: Any = None
    rollout: Any = None
    rollout_sent: float = 0.0
    scorer: Any = None
    scored: Any = None
    scored_sent: float = 0.0
    result: Scored | None = None


@dataclass
class Pending:
    """A batch on its way: sampled with ``version``, then scored, under ``reward.df: batch``
    against the document frequencies ``df`` of all its prompts."""

    step: int
    version: int
    df: Any = None
    shares: list[Share] = field(default_factory=list)


def split(items: list[_Item], parts: int) -> list[list[_Item]]:
    """Contiguous parts of nearly equal size, so that concatenating them restores the order."""
    bounds = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def late_ones(refs: list[Any], limit_s: float) -> list[int]:
    """Which of ``refs``, by place, are not there within the limit; those that failed are.

    One call for all takes a fraction of the time of a call for each."""
    _, missing = ray.wait(refs, num_returns=len(refs), timeout=limit_s, fetch_local=False)
    late = set(missing)
    return [i for i, ref in enumerate(refs) if ref in late]


@dataclass
class Calls:
    """Calls of workers that serve one after the other: who answers nothing for ``limit_s`` is late,
    however long the line is in which a call waits for its turn."""

    limit_s: float
    _workers: dict[Any, Any] = field(default_factory=dict)

    def add(self, ref: Any, worker: Any) -> None:
        """``worker`` was asked for ``ref``."""
        self._workers[ref] = worker

    def forget(self, ref: Any) -> None:
        """Nobody waits for ``ref`` any more."""
        self._workers.pop(ref, None)

    def late(self, refs: list[Any], meanwhile: Callable[[], None] = lambda: None) -> list[int]:
        """Waits for ``refs``, all of which were added: those that are there, or failed, are not
        late; returns by place those whose workers are, as soon as there are any.  ``meanwhile`` is
        called whenever further ones are there."""
        wanted, began = set(refs), time.monotonic()
        heard: dict[Any, float] = {}
        asked = {self._workers[ref] for ref in refs}
        missing = [ref for ref, worker in self._workers.items() if worker in asked]
        while left := wanted.intersection(missing):
            waits = {self._workers[ref] for ref in left}
            due = min(heard.get(worker, began) for worker in waits) + self.limit_s
            timeout = max(0.0, due - time.monotonic())
            there, missing = ray.wait(missing, timeout=timeout, fetch_local=False)
            if not there:
                # Ray waits for whole milliseconds, which may be a little less.
                if time.monotonic() >= due:
                    break
                continue
            if missing:
                # Those that came at the same time.
                more, missing = ray.wait(
                    missing, num_returns=len(missing), timeout=0.0, fetch_local=False
                )
                there += more
            heard.update(dict.fromkeys((self._workers[ref] for ref in there), time.monotonic()))
            meanwhile()
        now = time.monotonic()
        return [
            i
            for i, ref in enumerate(refs)
            if ref in left and heard.get(self._workers[ref], began) + self.limit_s <= now
        ]


def no_answer(limit_s: float, key: str) -> TimeoutError:
    """What ``key`` of the configuration allows has passed."""
    return TimeoutError(f"no answer within {limit_s:g} s ({key})")
