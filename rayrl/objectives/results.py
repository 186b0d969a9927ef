"""What a part of each slot returns, and the check that it does."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from rayrl.objectives.inject import BoundPart
from rayrl.objectives.plan import near

_TOKENS = ("[P,G,T]", "[P,G,1]")
_FACTORS = (*_TOKENS, "[P,1,1]")
_PAIRS = ("[P,G,G]",)
_LOSSES = ("[P,G,T]", "[P,G]", "[P]", "[]")

RESULTS: Mapping[str, tuple[str, ...]] = {
    "select": ("[P,G]",),
    "labels": ("[P,G]",),
    "segments": ("[P,G,T]",),
    "aggregate": ("[P,G]", "[P,G,K]", "[P,G,T]"),
    "advantage": ("[P,G]", *_TOKENS, "[N,P,G,T]", "[N,P,G,1]"),
    "mask": _FACTORS,
    "pairs": _PAIRS,
    "ratio": _TOKENS,
    "weights": _FACTORS,
    "mismatch": _FACTORS,
    "score": ("[P,G]",),
    "margin": _PAIRS,
    "link": _PAIRS,
    "surrogate": _LOSSES,
    "regularizers": _LOSSES,
    "reducer": ("[]",),
}
"""By slot, the shapes of the tensor that its parts return; K and N are any number, [] a scalar."""


def checked(part: BoundPart, result: Any, mask: Tensor) -> Any:
    """``result`` where it is what the slot of ``part`` wants for groups of this ``mask`` [P,G,T].

    Raises ValueError, naming the part, with what it returned and what is wanted."""
    if part.slot == "bounds":
        if isinstance(result, tuple) and len(result) == 2:
            return result
        raise _wrong(part, _described(result), "a pair (low, high)")
    shapes = RESULTS[part.slot]
    if not isinstance(result, Tensor):
        raise _wrong(part, _described(result), f"a tensor {' or '.join(shapes)}")
    sizes: dict[str, int] = dict(zip("PGT", mask.shape, strict=True))
    if any(_fits(tuple(result.shape), shape, sizes) for shape in shapes):
        return result
    here = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    raise _wrong(part, _described(result), f"{' or '.join(shapes)} with {here}")


def with_state(part: BoundPart, returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """The result and the new state that a part with a memory ``returned``; ValueError, naming the
    part, where it returned something else."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned
    raise _wrong(part, _described(returned), "(result, new state), for it reads state")


DECISIONS = ("coefficients", "stop_epoch", "scale_lr", "extrapolate")
"""What a controller may decide."""


def decisions_of(part: BoundPart, decided: Any, coefficients: Collection[str]) -> dict[str, Any]:
    """What a controller ``decided``, where all of it can be carried out, in an objective whose loss
    has these ``coefficients``.

    Raises ValueError, naming the controller, with what it decided."""
    if not isinstance(decided, Mapping):
        raise _wrong(part, _described(decided), f"a mapping of {', '.join(DECISIONS)}")
    changed = decided.get("coefficients", {})
    if not isinstance(changed, Mapping):
        raise _wrong(part, f"coefficients {changed!r}", "numbers by name")
    for name in decided:
        if name not in DECISIONS:
            raise ValueError(f"control {part.name} decides {name!r}{near(str(name), DECISIONS)}")
    for name, value in changed.items():
        if name not in coefficients:
            known = f"{near(str(name), coefficients)}" if coefficients else ""
            raise ValueError(
                f"control {part.name} sets {name!r}, which no part of the loss has{known}"
            )
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"control {part.name} sets {name} to {value!r}, want a number")
    if "extrapolate" in decided and "extrapolate" not in part.inputs:
        raise ValueError(
            f"control {part.name} decides to extrapolate and does not read 'extrapolate', by which "
            "the learner knows that it must remember weights"
        )
    return dict(decided)


def _fits(got: tuple[int, ...], shape: str, sizes: Mapping[str, int]) -> bool:
    want = [name for name in shape.strip("[]").split(",") if name]
    return len(got) == len(want) and all(
        size == (1 if name == "1" else sizes.get(name, size))
        for size, name in zip(got, want, strict=True)
    )


def _described(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__module__}.{type(value).__name__}".replace("a builtins.", "a ")


def _wrong(part: BoundPart, got: str, want: str) -> ValueError:
    return ValueError(f"{part.slot} {part.name} returned {got}, want {want}")
