"""The objectives by name: a paper is a preset that names its parts.

Plain data; see :mod:`rayrl.objectives.plan` for the slots.
"""

from __future__ import annotations

from collections.abc import Mapping

from rayrl.objectives.plan import SLOTS, Part, Plan, near
from rayrl.objectives.preset import Preset
from rayrl.objectives.presets_core import CORE

PRESETS: Mapping[str, Preset] = {**CORE}


def plan_of(name: str) -> Plan:
    """The plan of a preset; ValueError with near matches where there is none."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{near(name, PRESETS)}")
    return PRESETS[name].plan


def named_parts() -> dict[str, dict[str, Part]]:
    """By slot, the parts that some preset uses, with the parameters of its first use."""
    known: dict[str, dict[str, Part]] = {slot: {} for slot in SLOTS}
    for preset in PRESETS.values():
        for slot, item in preset.plan.parts():
            known[slot].setdefault(item.name, item)
    return known
