"""How what a further round brings joins the group that is there (:mod:`rayrl.rounds`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayrl.objectives.planners import replace_worst
from rayrl.types import Completion, ScoredGroup

Join = Callable[[ScoredGroup | None, ScoredGroup], ScoredGroup]
"""Makes one group of the one that is there, if any, and the one that was sampled."""


def replaced(old: ScoredGroup | None, new: ScoredGroup) -> ScoredGroup:
    """The new group in place of the old one."""
    return new


def extended(old: ScoredGroup | None, new: ScoredGroup) -> ScoredGroup:
    """The old group with the new captions at its end; prompt and greedy caption stay the old
    ones."""
    return new if old is None else _picked(old, new, [*_all(old, 0), *_all(new, 1)])


def worst_replaced(old: ScoredGroup | None, new: ScoredGroup) -> ScoredGroup:
    """The old group, its worst captions replaced by the best new ones, where these are better."""
    if old is None:
        return new
    better = dict(replace_worst(old.rewards, new.rewards, injected=len(new.rewards)))
    kept = _all(old, 0)
    return _picked(old, new, [(1, better[i]) if i in better else kept[i] for _, i in kept])


def grafted(old: ScoredGroup | None, new: ScoredGroup, *, parent: int) -> ScoredGroup:
    """The old group with captions that branched from its caption ``parent``.  The tokens that they
    share with it were sampled, with the parent's log-probs, and count as such."""
    assert old is not None
    logprobs = old.group.completions[parent].logprobs

    def on_policy(caption: Completion) -> Completion:
        shared = caption.num_forced
        own = np.concatenate([logprobs[:shared], caption.logprobs[shared:]])
        return replace(caption, logprobs=own, num_forced=0)

    captions = tuple(on_policy(caption) for caption in new.group.completions)
    return extended(old, replace(new, group=replace(new.group, completions=captions)))


def _all(group: ScoredGroup, source: int) -> list[tuple[int, int]]:
    return [(source, i) for i in range(len(group.rewards))]


def _picked(old: ScoredGroup, new: ScoredGroup, picks: Sequence[tuple[int, int]]) -> ScoredGroup:
    """The captions ``picks``, pairs of (0: of the old group, 1: of the new) and their place in it,
    with all that is known of each; in all else the old group.  Fields of pairs of captions go, for
    captions of two rounds were never compared."""

    def rows(of_old: Any, of_new: Any) -> list[Any]:
        return [(of_old, of_new)[source][i] for source, i in picks]

    def optional(of_old: Any, of_new: Any) -> tuple[Any, ...] | None:
        return None if of_old is None or of_new is None else tuple(rows(of_old, of_new))

    fields = {name: value for name, value in old.fields.items() if name in OF_THE_IMAGE}
    for name in old.fields.keys() & new.fields.keys() - OF_THE_IMAGE:
        if old.fields[name].ndim == 1:
            fields[name] = np.array(rows(old.fields[name], new.fields[name]))
    captions = rows(old.group.completions, new.group.completions)
    return replace(
        old,
        group=replace(old.group, completions=tuple(captions), group_size=len(picks)),
        rewards=np.array(rows(old.rewards, new.rewards)),
        terms={name: np.array(rows(old.terms[name], new.terms[name])) for name in old.terms},
        logged={name: np.array(rows(old.logged[name], new.logged[name])) for name in old.logged},
        fields=fields,
        wrong_spans=optional(old.wrong_spans, new.wrong_spans),
        prefix_rewards=optional(old.prefix_rewards, new.prefix_rewards),
    )


OF_THE_IMAGE = frozenset({"reference_rewards"})
"""Fields of a scored group that say something of its image and not of its captions."""

OF_PAIRS = frozenset({"similarity"})
"""Fields of pairs of captions, which a group of two rounds does not have."""
