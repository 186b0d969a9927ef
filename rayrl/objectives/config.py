"""Configuration of the objective; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from rayrl.objectives.plan import Phases, Plan, override, override_phases
from rayrl.objectives.presets import named_parts, preset_of
from rayrl.section import Section


class ObjectiveConfig(Section):
    """What the learner minimises: a preset, and what to change in it."""

    preset: str = "grpo"
    """One of rayrl.objectives.presets(), described in docs/objectives.md."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Single slots or parameters to change, as `kl_coef=0` or `advantage=leave_one_out`; several
    parts of one slot are joined by `+`, and no name empties it."""

    @model_validator(mode="after")
    def _exists(self) -> ObjectiveConfig:
        plan_with(self.preset, self.set)
        return self


def plan_with(preset: str, overrides: Mapping[str, Any]) -> Plan | Phases:
    """A preset's plan with single slots or parameters replaced.

    Raises ValueError with near matches where a preset, slot, part or parameter does not exist.
    """
    plan = preset_of(preset).plan
    try:
        if isinstance(plan, Phases):
            return override_phases(plan, overrides, named_parts())
        return override(plan, overrides, named_parts())
    except ValueError as error:
        raise ValueError(f"preset {preset}: {error}") from None
