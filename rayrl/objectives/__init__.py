"""Every objective in slots; ``rayrl.objectives.preset(name)`` builds one.

Importing this package needs no torch; building an objective does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayrl.objectives.config import ObjectiveConfig

if TYPE_CHECKING:
    from rayrl.objectives.objective import Objective

__all__ = ["ObjectiveConfig", "build", "preset", "presets"]


def presets() -> list[str]:
    """The names of all presets, those to start with first."""
    from rayrl.objectives.presets import PRESETS

    return sorted(PRESETS, key=lambda name: (not PRESETS[name].recommended, name))


def preset(name: str, **overrides: Any) -> Objective:
    """The objective of a preset: ``preset("grpo", kl_coef=0.0, advantage="leave_one_out")``.

    Raises ValueError with near matches where a preset, a slot or a parameter does not exist.
    """
    from rayrl.objectives.config import plan_with
    from rayrl.objectives.objective import Objective
    from rayrl.objectives.plan import Phases
    from rayrl.objectives.schedule import Schedule

    plan = plan_with(name, overrides)
    return Schedule(name, plan) if isinstance(plan, Phases) else Objective(name, plan)


def build(config: ObjectiveConfig, *, max_tokens: int) -> Objective:
    """The objective that a configuration describes, for captions of at most ``max_tokens`` tokens:
    a parameter ``max_tokens`` is that number where the configuration sets none."""
    from rayrl.objectives.config import plan_with
    from rayrl.objectives.override import parameters_of
    from rayrl.objectives.plan import Phases

    plan = plan_with(config.preset, config.set)
    plans = plan.plans if isinstance(plan, Phases) else (plan,)
    overrides = dict(config.set)
    if any("max_tokens" in parameters_of(one) for one in plans):
        overrides.setdefault("max_tokens", max_tokens)
    return preset(config.preset, **overrides)
