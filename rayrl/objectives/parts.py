"""Where a slot's parts live: the public functions of its modules, found by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rayrl.objectives import (
    advantage,
    mismatch,
    ratio,
    reduce,
    regularize,
    surrogate,
)
from rayrl.objectives.inject import BoundPart, bind
from rayrl.objectives.plan import Part, near

MODULES: Mapping[str, tuple[ModuleType, ...]] = {
    "advantage": (advantage,),
    "ratio": (ratio,),
    "bounds": (ratio,),
    "mismatch": (mismatch,),
    "surrogate": (surrogate,),
    "regularizers": (regularize,),
    "reducer": (reduce,),
}


def functions(slot: str) -> dict[str, Callable[..., Any]]:
    """The functions that a slot may name."""
    return {
        name: function
        for module in MODULES.get(slot, ())
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def resolve(slot: str, item: Part) -> BoundPart:
    """The part's function with its parameters; ValueError where a name does not exist."""
    if not isinstance(item.function, str):
        return bind(slot, item, item.function)
    known = functions(slot)
    if item.function not in known:
        raise ValueError(f"unknown part {item.function!r} for slot {slot}{near(item.name, known)}")
    return bind(slot, item, known[item.function])
