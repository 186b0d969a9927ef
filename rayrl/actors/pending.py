"""A batch on its way, in the parts that workers sample and score."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
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


def late_ones(
    refs: list[Any], limit_s: float, meanwhile: Callable[[], None] | None = None
) -> list[int]:
    """Which of ``refs``, by place, are not there within the limit; those that failed are.
    ``meanwhile`` is called whenever further ones are there.

    One call for all takes a fraction of the time of a call for each."""
    deadline, missing = time.monotonic() + limit_s, refs
    while missing:
        left, count = max(0.0, deadline - time.monotonic()), 1 if meanwhile else len(missing)
        there, missing = ray.wait(missing, num_returns=count, timeout=left, fetch_local=False)
        if meanwhile is None or not there:
            break
        if missing:
            # Those that came at the same time.
            _, missing = ray.wait(missing, num_returns=len(missing), timeout=0.0, fetch_local=False)
        meanwhile()
    late = set(missing)
    return [i for i, ref in enumerate(refs) if ref in late]


def no_answer(limit_s: float) -> TimeoutError:
    return TimeoutError(f"no answer within {limit_s:g} s")
