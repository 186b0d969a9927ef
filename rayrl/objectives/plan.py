"""A plan: which part fills which slot of an objective.  Plain data, so that reading a
configuration needs no torch; :mod:`rayrl.objectives.parts` finds the functions behind the names.

The slots, in the order in which they work, and what each produces:

    select        keep [P,G], weights of captions (0 drops); works on the raw rewards
    labels        labels [P,G] in [0,1]: which captions count as good
    segments      segments [P,G,T], ids of runs of tokens
    aggregate     rewards [P,G], [P,G,K] or [P,G,T]; each part maps the rewards so far
    advantage     advantages [P,G], [P,G,T] or, for losses that are summed, [N,P,G,T]
    mask          token weights [P,G,T] that also enter the denominator of a mean over tokens
    pairs         pair_weights [P,G,G]: how much "i is better than j" counts
    ratio, bounds log_ratio [P,G,T] of the policy to the old one; low and high bounds of the ratio
    weights       factors [P,G,T] on the losses of tokens
    mismatch      one such factor, for engine and learner disagreeing about a token's log-prob
    score, margin, link    scores [P,G] of captions -> margins [P,G,G] -> losses [P,G,G] of pairs
    surrogate     the policy's loss: [P,G,T], [P,G] or [P]
    regularizers  more losses of these shapes, or scalars
    reducer       from losses [P,G,T] of tokens to a scalar
    control       decisions after every optimizer step
    rollout       what the driver does before or during sampling
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """What fills a slot: a function, by its name or itself, and values for its parameters."""

    function: str | Callable[..., Any]
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        if isinstance(self.function, str):
            return self.function
        partial = isinstance(self.function, functools.partial)
        named = self.function.func if partial else self.function  # type: ignore[attr-defined]
        # An object that can be called is known by its class.
        return str(getattr(named, "__name__", type(named).__name__))

    def __str__(self) -> str:
        values = ", ".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.name}({values})" if values else self.name


def part(function: str | Callable[..., Any], **params: Any) -> Part:
    """``part("group_normalize", eps=1e-5)``, or ``part(my_own_function, strength=2.0)``."""
    return Part(function, params)


DEFAULT_REDUCER = Part("token_mean")
"""Of a plan that names none; losses of captions and groups need none."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parts of an objective; a slot that nothing reads stays empty (None or ())."""

    rollout: tuple[Part, ...] = ()
    select: tuple[Part, ...] = ()
    labels: Part | None = None
    segments: Part | None = None
    aggregate: tuple[Part, ...] = ()
    advantage: tuple[Part, ...] = ()
    mask: tuple[Part, ...] = ()
    pairs: Part | None = None
    ratio: Part | None = None
    bounds: Part | None = None
    weights: tuple[Part, ...] = ()
    mismatch: Part | None = None
    score: Part | None = None
    margin: Part | None = None
    link: Part | None = None
    surrogate: Part
    regularizers: tuple[Part, ...] = ()
    reducer: Part = DEFAULT_REDUCER
    control: tuple[Part, ...] = ()
    statistics_of: str = "all"
    """Whose rewards make a group's mean and spread: of `all` captions, or of those `kept`."""

    def __post_init__(self) -> None:
        for slot in ("surrogate", "reducer"):
            if not isinstance(getattr(self, slot), Part):
                raise ValueError(f"slot {slot} is empty: an objective needs one part there")
        if self.statistics_of not in ("all", "kept"):
            raise ValueError(f"statistics_of {self.statistics_of!r}: want 'all' or 'kept'")

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part with its slot."""
        for slot in SLOTS:
            value = getattr(self, slot)
            for item in value if isinstance(value, tuple) else (value,):
                if item is not None:
                    yield slot, item

    def parameters(self) -> dict[str, Any]:
        """The parameters that the plan sets, by name; parts have others, at their defaults."""
        return {key: value for _, item in self.parts() for key, value in item.params.items()}


@dataclass(frozen=True)
class Phases:
    """Plans that take turns, each for its number of steps, over and over."""

    plans: tuple[Plan, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.plans) != len(self.steps) or min(self.steps, default=0) < 1:
            raise ValueError(
                f"phases of {self.steps} steps for {len(self.plans)} plans, "
                "want one number a plan, each at least 1"
            )


SLOTS = tuple(f.name for f in dataclasses.fields(Plan) if f.name != "statistics_of")
MANY = frozenset(f.name for f in dataclasses.fields(Plan) if str(f.type).startswith("tuple"))
"""Slots that hold several parts."""


def near(given: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: what it may have meant, names that hold
    it first (``dcpo`` is short for ``dcpo_dynamic_clip``)."""
    names = sorted(known)
    asked = given.lower()
    longer = [name for name in names if asked and asked in name.lower()]
    longer.sort(key=lambda name: (not name.lower().startswith(asked), len(name)))
    alike = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    close = list(dict.fromkeys([*longer[:3], *alike]))[:4]
    if close:
        return f"; did you mean {', '.join(close)}?"
    if len(names) > _MANY_NAMES:
        return f"; {len(names)} are known, docs/objectives.md lists them"
    return f"; known are {', '.join(names)}"


_MANY_NAMES = 40
"""More are not read in an error message."""
