"""Objectives that take turns: so many steps of one, so many of the next, over and over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.inject import BoundPart
from rayrl.objectives.objective import LossOutput, Objective, Prepared, State
from rayrl.objectives.plan import Phases
from rayrl.objectives.reduce import Normalizer


class Schedule(Objective):
    """An objective for each phase (as in VerIPO, 2505.19000, read in its abstract); which one a
    step uses depends on the step alone.  The state of a phase is kept under its own key while the
    others run."""

    def __init__(self, name: str, phases: Phases) -> None:
        self.name = name
        self._steps = phases.steps
        self._objectives = [
            Objective(f"{name}, phase {i}", plan) for i, plan in enumerate(phases.plans)
        ]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(objective.needs for objective in self._objectives))

    def phases(self) -> tuple[Objective, ...]:
        return tuple(self._objectives)

    def check(self, provides: Any) -> None:
        for objective in self._objectives:
            objective.check(provides)

    def planners(self, step: int) -> tuple[BoundPart, ...]:
        return self._objectives[self.phase_at(step)].planners(step)

    def prepare_reads(self, step: int) -> frozenset[str]:
        return self._objectives[self.phase_at(step)].prepare_reads(step)

    def phase_at(self, step: int) -> int:
        """Which objective step ``step`` (from 0) uses."""
        within = step % sum(self._steps)
        for phase, steps in enumerate(self._steps):
            if within < steps:
                return phase
            within -= steps
        raise AssertionError("a step lies within one round of the phases")

    def prepare(self, state: State, batch: GroupBatch) -> tuple[dict[str, Any], Prepared]:
        step = int(state["step"])
        phase = self.phase_at(step)
        objective, key = self._objectives[phase], f"phase_{phase}"
        inner = state.get(key, objective.initial_state())
        inner, prepared = objective.prepare(inner, batch)
        return {**state, key: inner, "step": step + 1}, replace(prepared, phase=phase)

    def loss(
        self, prepared: Prepared, policy_logprobs: Tensor, normalizer: Normalizer, **options: Any
    ) -> LossOutput:
        return self._objectives[prepared.phase].loss(
            prepared, policy_logprobs, normalizer, **options
        )

    def control(
        self, state: State, metrics: Mapping[str, float]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        phase = self.phase_at(int(state["step"]) - 1)
        key = f"phase_{phase}"
        inner, decisions = self._objectives[phase].control(state[key], metrics)
        return {**state, key: inner}, decisions
