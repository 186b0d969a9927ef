"""How many rollout workers a run is better off with: arithmetic on what its steps measured."""

from __future__ import annotations

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
    recent: Sequence[StepTimes], workers: int, *, minimum: int, maximum: int, overlaps: bool
) -> int:
    """One worker more, one less, or as many as now.

    ``overlaps`` says whether sampling goes on while the learner trains (asynchronous runs).  The
    learner waits for the part of a batch's sampling time, shared evenly by the workers, that does
    not fit behind its own work: with staleness 0 that is all of it.  A worker is added where that
    saves 5 % of a step, and let go where it costs less than 1 %.
    """
    if len(recent) < WINDOW:
        return workers
    steps = recent[-WINDOW:]
    seconds = sum(step.seconds for step in steps)
    sampling = sum(step.sampling for step in steps)
    behind = sum(step.seconds - step.waited for step in steps) if overlaps else 0.0

    def waiting(count: int) -> float:
        return max(0.0, sampling / count - behind)

    if workers < maximum and waiting(workers) - waiting(workers + 1) >= GAIN * seconds:
        return workers + 1
    if workers > minimum and waiting(workers - 1) - waiting(workers) <= COST * seconds:
        return workers - 1
    return workers


def shortage(
    asked: Mapping[str, float], total: Mapping[str, float], free: Mapping[str, float]
) -> str:
    """Why a worker that asks for ``asked`` does not start, given a cluster's resources, summed
    over its nodes."""
    never = [name for name, amount in asked.items() if total.get(name, 0.0) < amount]
    taken = [name for name, amount in asked.items() if free.get(name, 0.0) < amount]
    if not taken:
        return "one is starting, or no single node has what it asks for"
    name = (never or taken)[0]
    has, left = total.get(name, 0.0), free.get(name, 0.0)
    return f"another asks for {asked[name]:g} {name}; of the cluster's {has:g}, {left:g} are free"
