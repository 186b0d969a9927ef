"""Calls parts: pure functions whose signatures say what they read.

A part is a function.  Its positional parameters are inputs, looked up by name among what the
batch, the other slots and the model provide; its keyword-only parameters are hyper-parameters,
fixed when the objective is built.  ``state`` as an input makes a part stateful: it gets what it
returned the last time and returns ``(result, new state)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayrl.objectives.plan import Part, near
from rayrl.objectives.signature import REQUIRED, defaults

TROUBLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What parts raise on groups that they cannot work with, or of which they expect something else;
which part it was is the error's first note."""


@dataclass(frozen=True)
class BoundPart:
    """A function with its hyper-parameters fixed."""

    slot: str
    name: str
    function: Callable[..., Any]
    params: Mapping[str, Any]
    inputs: tuple[str, ...]
    optional: frozenset[str]
    """Inputs with a default, which are passed when there is something to pass."""

    @property
    def stateful(self) -> bool:
        return "state" in self.inputs

    @property
    def memory(self) -> str:
        """Under what an objective's state holds that of this part."""
        return f"{self.slot} {self.name}"

    def with_params(self, **changes: Any) -> BoundPart:
        """The same function with other hyper-parameters."""
        return replace(self, params={**self.params, **changes})

    def __call__(self, values: Mapping[str, Any]) -> Any:
        given = {
            name: values[name]
            for name in self.inputs
            if name not in self.optional or values.get(name) is not None
        }
        try:
            return self.function(**given, **self.params)
        except TROUBLE as error:
            error.add_note(f"{self.slot} {self.name}")
            raise


def bind(slot: str, item: Part, function: Callable[..., Any]) -> BoundPart:
    """Check ``item``'s parameters against the function's signature.

    Raises ValueError naming the parameter that does not exist or that has no value.
    """
    inputs, optional, hyper = [], set(), defaults(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{slot} {item.name}: {parameter.name!r} is positional-only, and inputs are given "
                "by name; leave out the '/'"
            )
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            inputs.append(parameter.name)
            if parameter.default is not inspect.Parameter.empty:
                optional.add(parameter.name)
    for name in item.params:
        if name not in hyper:
            raise ValueError(f"{slot} {item.name}: no parameter {name!r}{near(name, hyper)}")
    params = {**hyper, **item.params}
    for name, value in params.items():
        if value is REQUIRED:
            raise ValueError(
                f"{slot} {item.name}: parameter {name!r} has no value; set it, {name}=..."
            )
    return BoundPart(slot, item.name, function, params, tuple(inputs), frozenset(optional))


class Values(Mapping[str, Any]):
    """What parts can read, by name; derived values are computed when first asked for."""

    def __init__(
        self,
        given: Mapping[str, Any],
        derived: Mapping[str, Callable[[Mapping[str, Any]], Any]],
    ) -> None:
        self._known = dict(given)
        self._derived = derived

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = self._derived[name](self)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._derived

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **self._derived})

    def __len__(self) -> int:
        return len({**self._known, **self._derived})

    @property
    def known(self) -> Mapping[str, Any]:
        """What is given or was derived so far."""
        return self._known
