"""What planners see and ask for.

A planner is a part in an objective's ``rollout`` slot, such as those of
:mod:`rayrl.objectives.sampling`: a pure function of the step so far, :class:`Drawn`, to further
:class:`Request` s.  :mod:`rayrl.rounds` asks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rayrl.joins import Join, replaced
from rayrl.objectives.inject import BoundPart
from rayrl.outline import Here, Results
from rayrl.rewards.score import Dropped
from rayrl.types import Prompt, ScoredGroup

Planner = BoundPart
"""A rollout part with its parameters; reads by name ``drawn``, ``take`` (the next so many prompts
of the run's order) and ``encode`` (the token ids of a caption's text, without an end token)."""

_NOTHING = Here(())


class Draw(NamedTuple):
    """How a prompt is sampled: ``size`` captions that begin with ``forced``, with ``seed`` and
    those after it."""

    size: int
    seed: int
    forced: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """``size`` captions of a prompt, for the group in place ``slot`` of the step, each beginning
    with the token ids ``forced``.  ``seed`` is set by :func:`rayrl.rounds.seeded`,
    ``join`` makes one group of the one in place and the new one (:mod:`rayrl.joins`)."""

    slot: int
    prompt: Prompt
    size: int
    forced: tuple[int, ...] = ()
    join: Join = replaced
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(
                f"prompt {self.prompt.prompt_id}: {self.size} captions, want at least 1"
            )

    @property
    def draw(self) -> Draw:
        return Draw(self.size, self.seed, self.forced)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A step so far.

    groups: by slot the scored group, None before it is sampled or where none could be scored
    results: what came of the step, once it is complete
    round: rounds that are scored; planners are asked before the first (0) and after each
    busy: slots that another planner asks for in this round already
    mean_reward: running mean over the groups of earlier steps, None before the first
    """

    step: int
    total_steps: int
    group_size: int
    prompts: tuple[Prompt, ...]
    groups: tuple[ScoredGroup | None, ...]
    dropped: tuple[Dropped, ...] = ()
    results: Results = _NOTHING
    round: int = 0
    busy: frozenset[int] = frozenset()
    mean_reward: float | None = None
    num_captions: int = 0
    asked_again: int = 0

    @property
    def free(self) -> list[int]:
        """Slots that nothing was asked for yet in this round."""
        return [slot for slot in range(len(self.prompts)) if slot not in self.busy]

    @property
    def free_groups(self) -> list[tuple[int, ScoredGroup]]:
        """Those of them that hold a group, with it."""
        pairs = ((slot, self.groups[slot]) for slot in self.free)
        return [(slot, group) for slot, group in pairs if group is not None]

    def metrics(self) -> dict[str, float]:
        """How much was sampled, and what was lost."""
        return {
            "rounds/count": float(self.round),
            "rounds/captions": float(self.num_captions),
            "rounds/asked_again": float(self.asked_again),
            "groups/dropped": float(len(self.dropped)),
        }


def plan(
    drawn: Drawn, planners: Sequence[Planner], supplies: Mapping[str, Any]
) -> tuple[Request, ...]:
    """What to sample next: what the planners ask for, each for slots that those before it left
    alone, and in the first round a whole group of every other prompt.

    Raises ValueError, naming the planner, for what is no request or for a slot that is none."""
    requests: list[Request] = []
    for planner in planners:
        asked = _requests(planner, {**supplies, "drawn": drawn})
        requests += asked
        drawn = replace(drawn, busy=drawn.busy | {request.slot for request in asked})
    if drawn.round == 0:
        requests += [
            Request(slot=slot, prompt=drawn.prompts[slot], size=drawn.group_size)
            for slot in drawn.free
        ]
    return tuple(sorted(requests, key=lambda request: request.slot))


def _requests(planner: Planner, values: Mapping[str, Any]) -> tuple[Request, ...]:
    """What a planner asks for, a generator's requests too."""
    answer = planner(values)
    if not isinstance(answer, Iterable):
        raise ValueError(f"rollout {planner.name} returned {answer!r}, want a list of requests")
    asked, count = tuple(answer), len(values["drawn"].prompts)
    for request in asked:
        if not isinstance(request, Request):
            raise ValueError(f"rollout {planner.name} asked for {request!r}, want a Request")
        if not 0 <= request.slot < count:
            raise ValueError(
                f"rollout {planner.name} asked for slot {request.slot}, want one of the step's, "
                f"0 to {count - 1}"
            )
    return asked
