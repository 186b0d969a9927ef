"""Where a slot's parts live: the public functions of its modules, found by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rayrl.objectives import (
    advantage,
    aggregate,
    bounds,
    control,
    credit,
    group_loss,
    history,
    labels,
    links,
    margins,
    masks,
    mismatch,
    pairs,
    ratio,
    reduce,
    regularize,
    sampling,
    scores,
    segments,
    select,
    shaping,
    surrogate,
    token_reward,
    weights,
)
from rayrl.objectives.inject import BoundPart, bind
from rayrl.objectives.plan import Part, near
from rayrl.objectives.signature import own_function

MODULES: Mapping[str, tuple[ModuleType, ...]] = {
    "rollout": (sampling,),
    "select": (select,),
    "labels": (labels,),
    "segments": (segments,),
    "aggregate": (aggregate, shaping, token_reward),
    "advantage": (advantage, history, credit),
    "mask": (masks,),
    "pairs": (pairs,),
    "ratio": (ratio,),
    "bounds": (bounds,),
    "weights": (weights,),
    "mismatch": (mismatch,),
    "score": (scores,),
    "margin": (margins,),
    "link": (links,),
    "surrogate": (surrogate, group_loss),
    "regularizers": (regularize,),
    "reducer": (reduce,),
    "control": (control,),
}


def functions(slot: str) -> dict[str, Callable[..., Any]]:
    """The functions that a slot may name."""
    return {
        name: function
        for module in MODULES[slot]
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def may_be_of_tokens(surrogate: BoundPart) -> bool:
    """Whether a loss may be one of tokens [P,G,T], which alone are reduced: all are but those of
    :mod:`rayrl.objectives.group_loss`.  What one's own function makes only its call shows."""
    return getattr(surrogate.function, "__module__", "") != group_loss.__name__


def resolve(slot: str, item: Part) -> BoundPart:
    """The part's function with its parameters: one of the slot's by its name, any other as
    `module:function`, or the function itself.  ValueError where there is none of that name."""
    own = own_function(slot, item)
    if own is not None:
        return bind(slot, item, own)
    known = functions(slot)
    if item.name not in known:
        raise ValueError(f"unknown part {item.name!r} for slot {slot}{near(item.name, known)}")
    return bind(slot, item, known[item.name])
