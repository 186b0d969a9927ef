"""Planners: what a step samples after its first round, given the rewards so far.

``drawn`` is the step (:class:`rayrl.rounds.Drawn`), ``take(n)`` the next n prompts of the run's
order, ``encode(text)`` the token ids of a caption.  A planner is asked before the first round
(``drawn.round`` is 0, no group is there) and after each one, until no planner asks for more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rayrl.rounds import Drawn, Request
from rayrl.types import Prompt, ScoredGroup


def refill(
    drawn: Drawn,
    take: Callable[[int], list[Prompt]],
    *,
    min_spread: float,
    refill_rounds: int,
) -> list[Request]:
    """Further images in place of groups whose rewards spread by ``min_spread`` or less, and of
    dropped ones (dynamic sampling, DAPO, 2503.14476).  After ``refill_rounds`` rounds the step is
    taken as it is; flat groups that are left train nothing."""
    if not 1 <= drawn.round <= refill_rounds:
        return []
    slots = [slot for slot in drawn.free if _spread(drawn.groups[slot]) <= min_spread]
    return [
        Request(slot=slot, prompt=prompt, size=drawn.group_size)
        for slot, prompt in zip(slots, take(len(slots)), strict=True)
    ]


def _spread(group: ScoredGroup | None) -> float:
    """Standard deviation of a group's rewards, exactly 0 where they are equal; -inf without one."""
    if group is None:
        return -np.inf
    rewards = group.rewards.astype(np.float64)
    return float(rewards.std()) if np.ptp(rewards) > 0 else 0.0
