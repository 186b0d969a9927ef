"""A plan with single slots or parameters replaced, as the configuration asks; needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rayrl.objectives.plan import DEFAULT_REDUCER, MANY, SLOTS, Part, Phases, Plan, near
from rayrl.objectives.presets import named_parameters, named_parts
from rayrl.objectives.signature import REQUIRED, defaults, examples, own_function

SEPARATOR = "+"
"""Between the items of a list on the command line, where a comma ends a `key=value`."""


def override(plan: Plan, values: Mapping[str, Any]) -> Plan:
    """``plan`` with single slots or parameters replaced, in whatever order they are given.

    values: a slot's name to the name of a part, a :class:`Part` or a function (several for slots
        that hold several; "" empties a slot), or a parameter's name to its value, in every part
        that has one of the name.  A part that the plan has already keeps its parameters.

    Raises ValueError on a slot, part or parameter that does not exist, with near matches.
    """
    slots = {key: value for key, value in values.items() if key in SLOTS}
    for slot, names in slots.items():
        plan = dataclasses.replace(plan, **{slot: _named(slot, names, plan)})
    for key, value in values.items():
        if key == "statistics_of":
            plan = dataclasses.replace(plan, statistics_of=value)
        elif key not in slots:
            plan = _with_parameter(plan, key, value)
    return plan


def override_phases(phases: Phases, values: Mapping[str, Any]) -> Phases:
    """The same in every phase that fills the slot, or in all where none does, and in every phase
    that has the parameter; ``phase_steps`` are the phases' lengths."""
    plans = list(phases.plans)
    steps = phases.steps
    for key in sorted(values, key=lambda name: name not in SLOTS):
        if key == "phase_steps":
            steps = _typed(key, values[key], steps)
            continue
        fits = [i for i, plan in enumerate(plans) if _concerns(plan, key)]
        if not fits and key not in SLOTS:
            names = {name for plan in plans for name in parameters_of(plan)}
            known = {*names, *SLOTS, "phase_steps"}
            raise ValueError(f"unknown slot or parameter {key!r}{near(key, known)}")
        for i in fits or range(len(plans)):
            plans[i] = override(plans[i], {key: values[key]})
    return Phases(tuple(plans), steps)


def _concerns(plan: Plan, key: str) -> bool:
    """Whether a plan has the parameter, or fills the slot with what it would not have anyhow."""
    if key in SLOTS:
        return getattr(plan, key) not in (None, (), DEFAULT_REDUCER)
    return key in parameters_of(plan)


def parameters_of(plan: Plan) -> frozenset[str]:
    """The names of all parameters that may be set: the keyword-only ones of its parts."""
    return frozenset(name for slot, item in plan.parts() for name in _settable(slot, item))


def takes_from_run(plan: Plan, name: str) -> bool:
    """Whether a parameter is the run's to say: that of a part of this package, or of the user's own
    without a value."""
    for slot, item in plan.parts():
        function = own_function(slot, item)
        if function is None:
            if name in _settable(slot, item):
                return True
        elif name not in item.params and defaults(function).get(name) is REQUIRED:
            return True
    return False


def _settable(slot: str, item: Part) -> dict[str, Any]:
    """By parameter of a part a value of its type, or None where nothing says it.  Functions of the
    user's own tell by their signature; of this package's parts the presets know it, which is
    without importing torch."""
    function = own_function(slot, item)
    if function is None:
        return {**named_parameters()[slot].get(item.name, {}), **item.params}
    return examples(function)


def _named(slot: str, given: Any, plan: Plan) -> Any:
    listed = given.split(SEPARATOR) if isinstance(given, str) else given
    listed = list(listed) if isinstance(listed, list | tuple) else [listed]
    there = {item.name: item for filled, item in plan.parts() if filled == slot}
    parts = [_part(slot, item, there) for item in listed if item != ""]
    if slot in MANY:
        return tuple(parts)
    if len(parts) > 1:
        raise ValueError(f"slot {slot} holds one part, got {', '.join(str(p) for p in parts)}")
    return parts[0] if parts else None


def _part(slot: str, given: Any, there: Mapping[str, Part]) -> Part:
    if isinstance(given, Part):
        return given
    if callable(given):
        return Part(given)
    if not isinstance(given, str):
        raise ValueError(f"slot {slot}: got {given!r}, want the name of a part")
    name, known = given.strip(), {**named_parts()[slot], **there}
    if ":" in name and name not in known:
        return Part(name)  # a function of the user's, looked up when it is needed
    if name not in known:
        module, _, function = name.rpartition(".")
        hint = f"; want module:function, {module}:{function}" if module else near(name, known)
        raise ValueError(f"unknown part {name!r} for slot {slot}{hint}")
    return known[name]


def _with_parameter(plan: Plan, name: str, value: Any) -> Plan:
    known = parameters_of(plan)
    if name not in known:
        names = [*known, *SLOTS, "statistics_of"]
        hint = _part_with(plan, name, value) or near(name, names)
        raise ValueError(f"unknown slot or parameter {name!r}{hint}")

    def replaced(slot: str, item: Part) -> Part:
        settable = _settable(slot, item)
        if name not in settable:
            return item
        return Part(item.function, {**item.params, name: _typed(name, value, settable[name])})

    changes: dict[str, Any] = {}
    for slot in SLOTS:
        old = getattr(plan, slot)
        if isinstance(old, tuple):
            changes[slot] = tuple(replaced(slot, item) for item in old)
        elif old is not None:
            changes[slot] = replaced(slot, old)
    return dataclasses.replace(plan, **changes)


def _part_with(plan: Plan, name: str, value: Any) -> str:
    """How a plan gets a parameter that none of its parts has; "" where no part has it."""
    for slot, parts in named_parameters().items():
        if having := [part for part, parameters in parts.items() if name in parameters]:
            there = [item.name for item in getattr(plan, slot)] if slot in MANY else []
            filled = SEPARATOR.join([*there, having[0]])
            return (
                f" here: it is one of {slot} {', '.join(having)}; to have it, "
                f"{slot}={filled} {name}={value}"
            )
    return ""


_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def _typed(name: str, given: Any, example: Any) -> Any:
    """``given`` as the type of ``example``; the command line brings text.  Without an example, text
    that is a number, or true or false, is read as that."""
    if example is None:
        return _read(given)
    kind = type(example)
    try:
        if kind is bool:
            return given if isinstance(given, bool) else _BOOLS[str(given).lower()]
        if kind in (tuple, list):
            items = given.split(SEPARATOR) if isinstance(given, str) else list(given)
            each = type(example[0]) if example else _read
            return kind(each(item) for item in items if item != "")
        if kind is dict:
            if isinstance(given, str):
                given = dict(item.split(":") for item in given.split(SEPARATOR) if item)
            return {str(key).strip(): float(value) for key, value in given.items()}
        if kind in (int, float) and isinstance(given, bool):
            raise TypeError
        if kind is int and float(given) != int(float(given)):
            raise ValueError
        return int(float(given)) if kind is int else kind(given)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(f"{name}: got {given!r}, want {kind.__name__}") from None


def _read(given: Any) -> Any:
    """Text that is a number, or true or false, as that; the rest as it is."""
    if not isinstance(given, str):
        return given
    text = given
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
