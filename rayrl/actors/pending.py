"""A batch on its way, in the parts that workers sample and score."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray

from rayrl.rounds import Request
from rayrl.shares import Scored

_Item = TypeVar("_Item")


@dataclass
class Share:
    """A part of a batch, from its request ``first`` on, and who samples and scores it; ``prompts``
    is a reference to the requests' prompts, with the images, ``result`` what became of them."""

    index: int
    first: int
    requests: list[Request]
    prompts: Any
    worker: Any = None
    rollout: Any = None
    scorer: Any = None
    scored: Any = None
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


def arrivals(refs: list[Any], limit_s: float) -> Iterator[None]:
    """Yields whenever further ones of ``refs`` are there or failed, until all did or the limit is
    over."""
    deadline, waiting = time.monotonic() + limit_s, refs
    while waiting:
        left = max(0.0, deadline - time.monotonic())
        some, _ = ray.wait(waiting, num_returns=1, timeout=left, fetch_local=False)
        if not some:
            return
        # With all that came at the same time.
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.0, fetch_local=False)
        yield


def late_ones(refs: list[Any], limit_s: float) -> list[int]:
    """Which of ``refs``, by place, are not there within the limit; those that failed are.

    One call for all takes a fraction of the time of a call for each."""
    there = set(ray.wait(refs, num_returns=len(refs), timeout=limit_s, fetch_local=False)[0])
    return [i for i, ref in enumerate(refs) if ref not in there]


def no_answer(limit_s: float) -> TimeoutError:
    return TimeoutError(f"no answer within {limit_s:g} s")
