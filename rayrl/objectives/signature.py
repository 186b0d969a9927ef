"""What the function of a part takes, by its signature; needs no torch.

Its positional parameters are inputs, given by name; its keyword-only parameters are what the
configuration may set.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rayrl import own_modules
from rayrl.objectives.plan import Part

REQUIRED = inspect.Parameter.empty
"""In place of a default where there is none."""

_ZEROS: Mapping[str, Any] = {"bool": False, "int": 0, "float": 0.0, "str": ""}


def own_function(slot: str, item: Part) -> Callable[..., Any] | None:
    """The function of a part that is the user's own, given itself or as `module:function`; None for
    a part of this package.

    Raises NotHereError, ValueError, naming the slot, where there is no such module or function."""
    if not isinstance(item.function, str):
        return item.function
    if ":" not in item.function:
        return None
    function = own_modules.load(item.function, f"slot {slot}")
    if not callable(function):
        raise ValueError(
            f"slot {slot}: {item.function!r} is a {type(function).__name__}, want a function"
        )
    return function  # type: ignore[no-any-return]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """By keyword-only parameter its default, or REQUIRED."""
    return {one.name: one.default for one in _keyword_only(function)}


def examples(function: Callable[..., Any]) -> dict[str, Any]:
    """By keyword-only parameter a value of its type: of the annotation where that is a plain one,
    else the default; None where neither says it."""
    return {
        one.name: _ZEROS.get(
            getattr(one.annotation, "__name__", str(one.annotation)),
            None if one.default is REQUIRED else one.default,
        )
        for one in _keyword_only(function)
    }


def _keyword_only(function: Callable[..., Any]) -> list[inspect.Parameter]:
    every = inspect.signature(function).parameters.values()
    return [one for one in every if one.kind is inspect.Parameter.KEYWORD_ONLY]
