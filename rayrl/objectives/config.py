"""Configuration of the objective; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from rayrl.objectives.override import override, override_phases
from rayrl.objectives.plan import Phases, Plan
from rayrl.objectives.presets import plan_of
from rayrl.own_modules import NotHereError
from rayrl.section import LocalPath, Section


class SourcesConfig(Section):
    """Where an objective gets what only some of them need; docs/objectives.md says which."""

    head_lr: PositiveFloat = 1e-2
    """Learning rate of what trains beside the policy: a critic, heads of single reward terms."""
    guide: LocalPath = ""
    """Folder of a preference-tuned copy of the model, which credits single tokens."""
    auxiliaries: tuple[LocalPath, ...] = ()
    """Folders of copies of the model, each trained on one auxiliary reward."""
    reference_samples: NonNegativeInt = 8
    """Captions of the stage-1 model, sampled of each image before the first step, whose rewards an
    objective may compare with; 0: it compares with the references, each against the others."""
    image_change: Literal["crop", "mask"] = "crop"
    """What is done to an image where captions are also scored after a changed one: a window of it,
    or grey over a window."""
    change_strength: float = Field(default=0.5, ge=0, lt=1)
    """How much of each side of the image the window takes away or covers."""


NO_SOURCES = SourcesConfig()
"""Nothing but the defaults."""


class ObjectiveConfig(Section):
    """What the learner minimises: a preset, and what to change in it."""

    preset: str = "grpo"
    """One of rayrl.objectives.presets(), described in docs/objectives.md, or a plan of one's own,
    `module:name`."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Single slots or parameters to change, as `kl_coef=0` or `advantage=leave_one_out`; several
    parts of one slot are joined by `+`, and no name empties it."""
    sources: SourcesConfig = NO_SOURCES

    @model_validator(mode="after")
    def _exists(self) -> ObjectiveConfig:
        # Who evaluates a run or looks at its folder needs none of its functions: that there is no
        # such module is said where the objective is built.
        with suppress(NotHereError):
            plan_with(self.preset, self.set)
        return self


def plan_with(preset: str, overrides: Mapping[str, Any]) -> Plan | Phases:
    """A preset's plan with single slots or parameters replaced.

    Raises ValueError with near matches where a preset, slot, part or parameter does not exist.
    """
    plan = plan_of(preset)
    try:
        if isinstance(plan, Phases):
            return override_phases(plan, overrides)
        return override(plan, overrides)
    except NotHereError as error:
        raise NotHereError(f"preset {preset}: {error}") from None
    except ValueError as error:
        raise ValueError(f"preset {preset}: {error}") from None
