"""Every objective in slots; ``rayrl.objectives.preset(name)`` builds one, and so does
``Objective(name, Plan(...))``.

Importing this package needs no torch; building an objective does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.config import ObjectiveConfig
from rayrl.objectives.plan import Part, Phases, Plan, part
from rayrl.objectives.preset_base import Preset

if TYPE_CHECKING:
    from rayrl.objectives.objective import Objective
    from rayrl.objectives.rehearsal import rehearse

__all__ = [
    "GroupBatch",
    "Objective",
    "ObjectiveConfig",
    "Part",
    "Phases",
    "Plan",
    "Preset",
    "build",
    "part",
    "preset",
    "presets",
    "rehearse",
]

_WITH_TORCH = {"Objective": "objective", "rehearse": "rehearsal"}


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)


def presets() -> list[str]:
    """The names of all presets, those to start with first."""
    from rayrl.objectives.presets import PRESETS

    return sorted(PRESETS, key=lambda name: (not PRESETS[name].recommended, name))


def preset(name: str, **overrides: Any) -> Objective:
    """The objective of a preset: ``preset("grpo", kl_coef=0.0, advantage="leave_one_out")``; or of
    a plan of one's own, ``preset("my_module:my_plan")``.

    Raises ValueError with near matches where a preset, a slot or a parameter does not exist.
    """
    from rayrl.objectives.config import plan_with
    from rayrl.objectives.objective import Objective
    from rayrl.objectives.schedule import Schedule

    plan = plan_with(name, overrides)
    return Schedule(name, plan) if isinstance(plan, Phases) else Objective(name, plan)


def build(config: ObjectiveConfig, *, max_tokens: int) -> Objective:
    """The objective that a configuration describes, for captions of at most ``max_tokens`` tokens:
    a parameter ``max_tokens`` is that number where the configuration sets none, and neither a plan
    nor a function of the user's own."""
    from rayrl.objectives.config import plan_with
    from rayrl.objectives.override import takes_from_run

    plan = plan_with(config.preset, config.set)
    plans = plan.plans if isinstance(plan, Phases) else (plan,)
    overrides = dict(config.set)
    if any(takes_from_run(one, "max_tokens") for one in plans):
        overrides.setdefault("max_tokens", max_tokens)
    return preset(config.preset, **overrides)
