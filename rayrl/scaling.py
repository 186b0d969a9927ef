"""How many rollout workers a run is better off with: arithmetic on what its steps measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WINDOW = 5
"""Steps that are looked at; fewer than that change nothing."""
GAIN = 0.05
"""Share of a step that one more worker must save."""
COST = 0.01
"""Share of a step that one worker less may cost.  Below GAIN, so that a worker that was let go is
not asked for again by the same numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """A step of ``seconds``: for ``waited`` of them the learner had no groups to train on, and
    the workers spent ``sampling`` seconds, all added up, on one batch."""

    seconds: float
    waited: float
    sampling: float


def wanted_workers(
    recent: Sequence[StepTimes],
    workers: int,
    *,
    parts: int,
    minimum: int,
    maximum: int,
    overlaps: bool,
) -> int:
    """How many workers there should be, given that there are ``workers`` now.

    ``parts`` is in how many a batch is cut, which are sampled whole: two workers take as long for
    three of them as for four.  ``overlaps`` says whether sampling goes on while the learner trains
    (asynchronous runs): then the next batch follows at once, so that no worker waits for the last
    part of a batch, and the learner waits for what does not fit behind its own work.  Workers are
    added where each of them saves 5 % of a step, and let go where that costs less than 1 %.
    """
    if len(recent) < WINDOW:
        return workers
    steps = recent[-WINDOW:]
    seconds = sum(step.seconds for step in steps)
    sampling = sum(step.sampling for step in steps)
    behind = sum(step.seconds - step.waited for step in steps) if overlaps else 0.0

    def waiting(count: int) -> float:
        if overlaps:
            return max(0.0, sampling / count - behind)
        return sampling / parts * math.ceil(parts / count)

    now = waiting(workers)
    for more in range(workers + 1, maximum + 1):
        # Past those that save nothing by themselves.
        if now - waiting(more) >= (more - workers) * GAIN * seconds:
            return more
    for fewer in range(minimum, workers):
        if waiting(fewer) - now <= COST * seconds:
            return fewer
    return workers


def shortage(
    asked: Mapping[str, float],
    total: Mapping[str, float],
    free: Mapping[str, float],
    *,
    who: str = "another asks for",
) -> str:
    """Why a worker that asks for ``asked`` does not start, or several together do not, given a
    cluster's resources, summed over its nodes."""
    never = [name for name, amount in asked.items() if total.get(name, 0.0) < amount]
    taken = [name for name, amount in asked.items() if free.get(name, 0.0) < amount]
    if not taken:
        return "one is starting, or no single node has what it asks for"
    name = (never or taken)[0]
    has, left = total.get(name, 0.0), free.get(name, 0.0)
    return f"{who} {asked[name]:g} {name}; of the cluster's {has:g}, {left:g} are free"
