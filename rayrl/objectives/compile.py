"""From a plan to parts that can be called: finds functions, checks that everything that is read
is provided and everything that is provided is read, and collects what the trainer must bring."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayrl.objectives.batch import GRAPH_FIELDS, OPTIONAL_FIELDS
from rayrl.objectives.inject import BoundPart
from rayrl.objectives.inputs import BEFORE_LOSS, DERIVED, INPUTS, LOSS, SERVICES, readable
from rayrl.objectives.parts import may_be_of_tokens, resolve
from rayrl.objectives.plan import DEFAULT_REDUCER, SLOTS, Plan, near

_NEED_OF = {"total": "whole_minibatch"}
"""Needs that go by another name than the input that shows them."""

PROVIDED = frozenset(
    {
        *("ref_logprobs", "greedy_rewards", "forced", "old_logprobs", "entropy", "terms"),
        *("extrapolate", "values", "policy_values", "collision", "anchor_logprobs", "anchor_mask"),
        *("reference_rewards", "similarity", "prefix_values", "head_logprobs"),
        *("augmented_logprobs", "augmented_ref_logprobs", "earlier", "caption_features"),
    }
)
"""Needs that the driver and the learner of this package always can bring."""

_JUDGE = "a reward term of kind function or http that gives them"
CONFIGURED: Mapping[str, str] = {
    "judge_ok": "reward.constraints",
    "reward_versions": _JUDGE,
    "token_credit": _JUDGE,
    "guide_logprobs": "objective.sources.guide",
    "auxiliary_logprobs": "objective.sources.auxiliaries",
}
"""Needs that are brought once something is configured, and what."""

POLICY_LOSS = "policy"
"""The name of the surrogate's loss among the losses of an update."""

_ROOTS = frozenset(
    {"rollout", "select", "weights", "mismatch", "surrogate", "regularizers", "control"}
)
_CHANGED: Mapping[str, str] = {
    "rewards": "aggregate",
    "token_weights": "mask",
    "normalizer": "mask",
}
"""Names that are always there, and the slot that changes what they stand for."""

_BEFORE_AGGREGATE = frozenset({"select", "labels", "segments", "aggregate"})
"""Slots whose parts read the raw rewards, or make others of them."""

_STATISTICS = ("labels", "segments", "aggregate", "advantage")
"""Slots whose parts see by `valid` the captions that statistics_of names."""


@dataclass(frozen=True)
class Compiled:
    """The parts of every slot, and by need the parts that have it."""

    slots: Mapping[str, tuple[BoundPart, ...]]
    needs_of: Mapping[str, tuple[str, ...]]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.needs_of)

    @property
    def read_before_loss(self) -> frozenset[str]:
        """Inputs of the parts that run once a step, those with a default included."""
        parts = (part for slot in BEFORE_LOSS for part in self.slots[slot])
        return frozenset(name for part in parts for name in part.inputs)

    @property
    def parameters(self) -> dict[str, Any]:
        """The values of all parameters, by name."""
        return {
            k: v for items in self.slots.values() for part in items for k, v in part.params.items()
        }

    @property
    def coefficients(self) -> frozenset[str]:
        """The parameters that controllers may change: those of the loss."""
        return frozenset(key for slot in LOSS for part in self.slots[slot] for key in part.params)

    def one(self, slot: str) -> BoundPart | None:
        """The only part of a slot that holds at most one."""
        return self.slots[slot][0] if self.slots[slot] else None


def compile_plan(name: str, plan: Plan) -> Compiled:
    """Find and check all parts; ValueError, naming the objective, on what does not fit."""
    slots: dict[str, tuple[BoundPart, ...]] = dict.fromkeys(SLOTS, ())
    try:
        for slot, item in plan.parts():
            bound = resolve(slot, item)
            if not _switched_off(bound):
                slots[slot] += (bound,)
        _check_first_advantage(slots["advantage"])
        _check_regularizers(slots["regularizers"])
        _check_memories([part for items in slots.values() for part in items if part.stateful])
        used = _reachable(slots)
    except ValueError as error:
        raise ValueError(f"objective {name}: {error}") from None
    for slot, items in slots.items():
        # A plan has a reducer whether one was asked for or not.
        if items and slot not in used and getattr(plan, slot) != DEFAULT_REDUCER:
            raise ValueError(
                f"objective {name}: slot {slot} is filled with {items[0].name}, "
                "but no other part reads what it produces"
            )
    statistics = (part for slot in _STATISTICS for part in slots[slot])
    if plan.statistics_of == "kept" and not any("valid" in part.inputs for part in statistics):
        raise ValueError(
            f"objective {name}: statistics_of is kept, but no part of {', '.join(_STATISTICS)} "
            "reads 'valid', the captions that it is about; want statistics_of=all"
        )
    needs_of: dict[str, tuple[str, ...]] = {}
    for bound in (bound for items in slots.values() for bound in items):
        for need in _needs(bound):
            needs_of[need] = (*needs_of.get(need, ()), f"{bound.slot} {bound.name}")
    return Compiled(slots, needs_of)


def missing(name: str, compiled: Compiled, lacking: Collection[str]) -> str:
    """In words: what is lacking and which part needs it."""
    words = {**OPTIONAL_FIELDS, **GRAPH_FIELDS, **SERVICES}
    lines = [
        f"{need} ({words[need]}{_remedy(need)}), for {', '.join(compiled.needs_of[need])}"
        for need in sorted(lacking)
    ]
    return f"objective {name} needs " + "; ".join(lines)


def _remedy(need: str) -> str:
    return f"; configure {CONFIGURED[need]}" if need in CONFIGURED else ""


def _switched_off(bound: BoundPart) -> bool:
    """A part whose coefficient is 0 is left out, and with it what it needs."""
    return any(key.endswith("_coef") and value == 0 for key, value in bound.params.items())


def _reachable(slots: Mapping[str, tuple[BoundPart, ...]]) -> set[str]:
    """Slots whose result is read, starting from those that make the loss."""
    used = {slot for slot in _ROOTS if slots[slot]}
    if slots["regularizers"] or any(may_be_of_tokens(part) for part in slots["surrogate"]):
        used.add("reducer")
    waiting = list(used)
    while waiting:
        for bound in slots[waiting.pop()]:
            changing = [slot for slot in _changing(bound) if slots[slot]]
            for source in (*_sources(bound), *changing):
                if not slots[source] and source not in used:
                    raise ValueError(
                        f"{bound.slot} {bound.name} reads {_read(bound, source)}, "
                        f"so the slot {source} must be filled"
                    )
                if source not in used:
                    used.add(source)
                    waiting.append(source)
    return used


def _check_first_advantage(parts: tuple[BoundPart, ...]) -> None:
    if parts and "advantages" in parts[0].inputs:
        raise ValueError(
            f"advantage {parts[0].name} changes the advantages of the part before it, "
            "and there is none"
        )


def _check_regularizers(parts: tuple[BoundPart, ...]) -> None:
    """Each is a loss of its own, added and reported by its name."""
    names = [part.name for part in parts]
    for name in names:
        if name == POLICY_LOSS:
            raise ValueError(f"regularizers {name}: that name is the policy loss's; want another")
        if names.count(name) > 1:
            raise ValueError(
                f"regularizers {'+'.join(names)}: {name} is there {names.count(name)} times, want "
                "once; a larger coefficient counts more, and two functions want two names"
            )


def _check_memories(parts: Sequence[BoundPart]) -> None:
    memories = [part.memory for part in parts]
    for memory in memories:
        if memories.count(memory) > 1:
            raise ValueError(
                f"{memory} is there {memories.count(memory)} times and remembers its state by its "
                "name; want it once, or functions of other names"
            )


def _sources(bound: BoundPart) -> Iterable[str]:
    """The slots that produce what ``bound`` reads; ValueError on what nothing produces."""
    if bound.slot == "rollout" and "drawn" not in bound.inputs:
        raise ValueError(f"rollout {bound.name} does not read 'drawn', what the step drew so far")
    for name in bound.inputs:
        if name not in INPUTS:
            raise ValueError(
                f"{bound.slot} {bound.name} reads {name!r}, which nothing provides"
                f"{near(name, INPUTS)}"
            )
        if bound.slot not in INPUTS[name].slots:
            raise ValueError(
                f"{bound.slot} {bound.name} reads {name!r}, which only "
                f"{', '.join(INPUTS[name].slots)} can; beside its needs a part of {bound.slot} can "
                f"read {', '.join(readable(bound.slot))}"
            )
        # An advantage part may change the advantages of the one before it.
        if name in DERIVED and name not in bound.optional and DERIVED[name] != bound.slot:
            yield DERIVED[name]


def _changing(bound: BoundPart) -> Iterable[str]:
    """The slots that change what ``bound`` reads, where they are filled."""
    for name in bound.inputs:
        raw = name == "rewards" and bound.slot in _BEFORE_AGGREGATE
        if name in _CHANGED and not raw:
            yield _CHANGED[name]


def _read(bound: BoundPart, slot: str) -> str:
    return ", ".join(name for name in bound.inputs if DERIVED.get(name) == slot)


def _needs(bound: BoundPart) -> Iterable[str]:
    if bound.slot == "rollout":
        return
    for name in bound.inputs:
        if name in bound.optional:
            continue
        need = _NEED_OF.get(name, name)
        late = need == "old_logprobs" and bound.slot not in BEFORE_LOSS
        if not late and (need in OPTIONAL_FIELDS or need in GRAPH_FIELDS or need in SERVICES):
            yield need
