"""Planners: what a step samples after its first round, given the rewards so far.

``drawn`` is the step (:class:`rayrl.planning.Drawn`), ``take(n)`` the next n prompts of the run's
order, ``encode(text)`` the token ids of a caption.  A planner is asked before the first round
(``drawn.round`` is 0, no group is there) and after each one, until no planner asks for more.  The
arithmetic is in :mod:`rayrl.objectives.planners`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from rayrl.data.augment import with_noise
from rayrl.joins import extended, grafted, worst_replaced
from rayrl.objectives import planners
from rayrl.planning import Drawn, Request
from rayrl.types import Prompt, ScoredGroup

Encode = Callable[[str], list[int]]


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


def hint_by_prefix(
    drawn: Drawn, encode: Encode, *, hint_floor: float, hint_shares: tuple[float, ...]
) -> list[Request]:
    """Groups of which no caption is above ``hint_floor`` are sampled again, whole, after the first
    tokens of a reference; the share of it grows in stages over the run (GHPO, 2507.10628)."""
    stage = drawn.step * len(hint_shares) // drawn.total_steps
    return [
        Request(slot=slot, prompt=prompt, size=drawn.group_size, forced=tuple(ids))
        for slot, prompt in _failing(drawn, hint_floor)
        if (
            ids := planners.reference_prefix(
                encode(_reference(drawn, prompt)), stage, hint_shares=hint_shares
            )
        )
    ]


def hint_in_context(
    drawn: Drawn, *, hint_floor: float, hint_words: int, guided: int
) -> list[Request]:
    """Groups of which no caption is above ``hint_floor`` get ``guided`` more, sampled with the
    first words of a reference in the instruction; the policy trains on them without it (Guide,
    2506.13923, read in its abstract)."""
    requests = []
    for slot, prompt in _failing(drawn, hint_floor):
        hint = " ".join(_reference(drawn, prompt).split()[:hint_words])
        guided_prompt = replace(prompt, text=f"{prompt.text} Hint: {hint}")
        requests.append(Request(slot=slot, prompt=guided_prompt, size=guided, join=extended))
    return requests


def inject_prefix(
    drawn: Drawn,
    encode: Encode,
    *,
    hint_floor: float,
    hint_shares: tuple[float, ...],
    injected: int,
) -> list[Request]:
    """In groups of which no caption is above ``hint_floor``, up to ``injected`` captions that begin
    as a reference does replace the worst ones, where they are better (IGPO, 2509.10396, read in its
    abstract)."""
    hinted = hint_by_prefix(drawn, encode, hint_floor=hint_floor, hint_shares=hint_shares)
    return [replace(request, size=injected, join=worst_replaced) for request in hinted]


def allocate(drawn: Drawn, *, exploration: float, extra_share: float) -> list[Request]:
    """Further captions, ``extra_share`` of those of the first round, for the images whose mean
    reward they tell most about (XRPO, 2510.06672; the size of the budget is ours)."""
    groups = [(slot, group) for slot, group in drawn.free_groups if len(group.rewards) > 1]
    if drawn.round != 1 or not groups:
        return []
    given = planners.allocate(
        [len(group.rewards) for _, group in groups],
        [group.rewards.std(ddof=1) for _, group in groups],
        round(extra_share * sum(len(group.rewards) for _, group in groups)),
        exploration=exploration,
    )
    return [
        Request(slot=slot, prompt=group.group.prompt, size=int(count), join=extended)
        for (slot, group), count in zip(groups, given, strict=True)
        if count
    ]


def branch(drawn: Drawn, *, tree_depths: tuple[int, ...], tree_width: int) -> list[Request]:
    """Trees of captions: fewer captions at first; then, depth by depth, each gets
    ``tree_width`` - 1 others that share its first tokens, up to the group's size (Dynamic-TreeRPO,
    read in its abstract).  A caption that ended before the depth has others from the start.

    Raises ValueError where the group's size is no multiple of the leaves of a tree."""
    leaves = tree_width ** len(tree_depths)
    if drawn.group_size % leaves or list(tree_depths) != sorted(set(tree_depths)):
        raise ValueError(
            f"tree_depths {list(tree_depths)} (want them to rise) and tree_width {tree_width} give "
            f"trees of {leaves} captions, want a divisor of train.group_size {drawn.group_size}"
        )
    if drawn.round == 0:
        return [
            Request(slot=slot, prompt=drawn.prompts[slot], size=drawn.group_size // leaves)
            for slot in drawn.free
        ]
    if drawn.round > len(tree_depths) or tree_width == 1:
        return []
    depth = tree_depths[drawn.round - 1]
    return [
        Request(
            slot=slot,
            prompt=group.group.prompt,
            size=tree_width - 1,
            forced=tuple(caption.token_ids[:depth].tolist())
            if len(caption.token_ids) > depth
            else (),
            join=partial(grafted, parent=i),
        )
        for slot, group in drawn.free_groups
        for i, caption in enumerate(group.group.completions)
    ]


def change_by_difficulty(
    drawn: Drawn, encode: Encode, *, noise_rate: float, hint_rate: float
) -> list[Request]:
    """Every image again, changed by how far its captions' mean reward is from the running mean
    (DeepVideo-R1, 2506.07464, which gives no rates): pictures with higher rewards get noise,
    ``noise_rate`` of the pixels' range for each unit of reward; for the others captions begin as a
    reference does, ``hint_rate`` of it for each unit, at most three quarters."""
    if drawn.round != 1:
        return []
    groups = drawn.free_groups
    own = np.mean([group.rewards.mean() for _, group in groups]) if groups else 0.0
    mean = float(own) if drawn.mean_reward is None else drawn.mean_reward
    requests = []
    for slot, group in groups:
        prompt, forced = group.group.prompt, tuple[int, ...]()
        strength = float(planners.change_strength(group.rewards[None], mean)[0])
        if strength > 0:
            image = with_noise(prompt.image, noise_rate * strength, seed=drawn.step)
            prompt = replace(prompt, image=image)
        else:
            ids = encode(_reference(drawn, prompt))
            share = min(0.75, -hint_rate * strength)
            forced = tuple(planners.reference_prefix(ids, 0, hint_shares=(share,)))
        requests.append(Request(slot=slot, prompt=prompt, size=drawn.group_size, forced=forced))
    return requests


def _failing(drawn: Drawn, hint_floor: float) -> Iterator[tuple[int, Prompt]]:
    """After the first round, the slots and prompts of groups that a hint may help."""
    if drawn.round == 1:
        for slot, group in drawn.free_groups:
            if planners.needs_hint(group.rewards[None], hint_floor=hint_floor)[0]:
                yield slot, group.group.prompt


def _reference(drawn: Drawn, prompt: Prompt) -> str:
    """One of the prompt's references; they take turns."""
    return prompt.references[drawn.step % len(prompt.references)]


def _spread(group: ScoredGroup | None) -> float:
    """Standard deviation of a group's rewards, exactly 0 where they are equal; -inf without one."""
    if group is None:
        return -np.inf
    rewards = group.rewards.astype(np.float64)
    return float(rewards.std()) if np.ptp(rewards) > 0 else 0.0
