"""Which reward terms nothing but the log reads: where one of them fails, training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rayrl.config import Config
from rayrl.objectives import build
from rayrl.objectives.config import plan_with
from rayrl.objectives.plan import Part, Phases
from rayrl.rewards.config import FunctionConfig, HttpConfig

_OF_JUDGES = frozenset({"reward_versions", "token_credit"})


def only_logged(config: Config) -> tuple[str, ...]:
    """The terms of weight 0 that no constraint names and no parameter of the objective, and from
    which it needs nothing else that a judge says.  None where a part of the objective is the
    user's own function, which may read any."""
    plan = plan_with(config.objective.preset, config.objective.set)
    plans = plan.plans if isinstance(plan, Phases) else (plan,)
    parts = [part for one in plans for _, part in one.parts()]
    if any(_is_own(part) for part in parts):
        return ()
    needs = build(config.objective, max_tokens=config.sampling.max_tokens).needs
    named = {text for part in parts for text in _texts(part.params)}
    return tuple(
        name
        for name, term in config.reward.terms.items()
        if term.weight == 0
        and name not in named
        and name not in config.reward.constraints
        and not (_OF_JUDGES & needs and isinstance(term, FunctionConfig | HttpConfig))
    )


def _is_own(part: Part) -> bool:
    return not isinstance(part.function, str) or ":" in part.function


def _texts(value: Any) -> Iterator[str]:
    """Every text in a parameter's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
