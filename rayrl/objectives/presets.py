"""The objectives by name: a paper is a preset that names its parts.

Plain data; see :mod:`rayrl.objectives.plan` for the slots.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from rayrl import own_modules
from rayrl.objectives.plan import SLOTS, Part, Phases, Plan, near, part
from rayrl.objectives.preset_base import Preset
from rayrl.objectives.presets_advantage import ADVANTAGE
from rayrl.objectives.presets_core import CORE
from rayrl.objectives.presets_data import DATA
from rayrl.objectives.presets_group import GROUP
from rayrl.objectives.presets_pairs import PAIRS
from rayrl.objectives.presets_policy import POLICY
from rayrl.objectives.presets_reward import REWARD

FAMILIES: Mapping[str, Mapping[str, Preset]] = {
    "General": CORE,
    "Rewards: aggregation and shaping": REWARD,
    "Advantages and critics": ADVANTAGE,
    "Policy losses of tokens": POLICY,
    "Policy losses of groups": GROUP,
    "Preferences on fresh groups": PAIRS,
    "Batches, hints and regularizers": DATA,
}

PRESETS: Mapping[str, Preset] = {
    name: preset for family in FAMILIES.values() for name, preset in family.items()
}

ALTERNATIVES: Mapping[str, tuple[Part, ...]] = {
    "select": (
        part("resample_extremes", other_weight=0.0),
        part("resample_best", best_weight=0.4),
    ),
    "mismatch": (part("sequence_masked", is_low=0.5, is_high=2.0),),
    "pairs": (part("all_pairs", min_gap=0.0),),
    "score": (part("forward_kl"), part("jensen_shannon")),
    "link": (part("hinge"), part("robust", label_noise=0.1)),
    "surrogate": (part("importance_weighted"),),
    "regularizers": (
        part("kl_k1", kl_coef=0.04),
        part("kl_k2", kl_coef=0.04),
        part("kl_k3_straight", kl_coef=0.04),
        part("nll_behaviour", nll_coef=0.1),
    ),
}
"""Parts that no preset has; overrides may name them."""


def plan_of(name: str) -> Plan | Phases:
    """The plan of the preset of this name, or the user's own, named as `module:name`, be it a plan
    or something that has one: a :class:`Preset`, an objective.

    Raises ValueError, with near matches, where there is none; NotHereError where there is no such
    module."""
    if ":" in name:
        found = own_modules.load(name, "preset")
        plan = getattr(found, "plan", found)
        if not isinstance(plan, Plan | Phases):
            raise ValueError(f"preset {name!r} is a {type(found).__name__}, want a Plan")
        return plan
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}{near(name, PRESETS)}; a plan of one's own is module:name"
        )
    return PRESETS[name].plan


def plans_of(preset: Preset) -> tuple[Plan, ...]:
    """The preset's plan, or those of its phases."""
    return preset.plan.plans if isinstance(preset.plan, Phases) else (preset.plan,)


@functools.cache
def named_parts() -> dict[str, dict[str, Part]]:
    """By slot, the parts that overrides may name, with the parameters of their first use."""
    known: dict[str, dict[str, Part]] = {slot: {} for slot in SLOTS}
    for slot, item in _uses():
        known[slot].setdefault(item.name, item)
    return known


@functools.cache
def named_parameters() -> dict[str, dict[str, dict[str, Any]]]:
    """By slot and part, every parameter that some preset sets, with the value of its first use:
    all that the part has, as a test holds."""
    known: dict[str, dict[str, dict[str, Any]]] = {slot: {} for slot in SLOTS}
    for slot, item in _uses():
        mine = known[slot].setdefault(item.name, {})
        known[slot][item.name] = {**item.params, **mine}
    return known


def _uses() -> Iterator[tuple[str, Part]]:
    for preset in PRESETS.values():
        for plan in plans_of(preset):
            yield from plan.parts()
    for slot, parts in ALTERNATIVES.items():
        yield from ((slot, item) for item in parts)
