"""Many small objects as a few arrays, for the way from one process to another.

Pickling costs by the object, not by the byte: 4,096 captions of 20 tokens are half a megabyte, but
with two arrays each they take several times as long as the same numbers in one array.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

Columns = Mapping[str, Any]
"""The fields of like objects by name, each one column: of the kinds below, or a list of values."""


class Joined(NamedTuple):
    """Arrays [n_i, ...] end to end: ``values`` [n_0 + n_1 + …, ...] and where each begins and
    ends."""

    values: np.ndarray
    bounds: tuple[int, ...]


class Table(NamedTuple):
    """Mappings that have the same keys, a column each."""

    columns: Columns


class Rows(NamedTuple):
    """Dataclass instances of one type."""

    kind: type
    columns: Columns


class Runs(NamedTuple):
    """Tuples of arrays or of dataclass instances, end to end, and where each begins and ends."""

    column: Any
    bounds: tuple[int, ...]


def pack(items: Sequence[Any], *, without: Collection[str] = ()) -> Columns:
    """The fields of dataclass instances of one type, each as one column; those in ``without`` are
    left out."""
    names = [field.name for field in fields(items[0])] if items else []
    return {
        name: _column([getattr(item, name) for item in items])
        for name in names
        if name not in without
    }


def unpack(kind: type, columns: Columns, **others: Sequence[Any]) -> list[Any]:
    """The instances of ``kind`` that :func:`pack` took apart, checked again as they are made; their
    arrays are views.  ``others`` are the columns that were left out."""
    names = [*columns, *others]
    split = [*(_values(column) for column in columns.values()), *others.values()]
    if not columns:
        # Of nothing :func:`pack` makes nothing, whatever is beside it.
        return []
    return [kind(**dict(zip(names, row, strict=True))) for row in zip(*split, strict=True)]


def _column(values: list[Any]) -> Any:
    first = values[0] if values else None
    if isinstance(first, np.ndarray) and _joinable(values):
        return Joined(np.concatenate(values), _bounds(values))
    if isinstance(first, Mapping) and first and all(some.keys() == first.keys() for some in values):
        return Table({name: _column([some[name] for some in values]) for name in first})
    if _one_dataclass(values):
        return Rows(type(first), pack(values))
    if isinstance(first, tuple) and all(isinstance(value, tuple) for value in values):
        flat = list(chain.from_iterable(values))
        if _one_dataclass(flat) or (flat and isinstance(flat[0], np.ndarray) and _joinable(flat)):
            return Runs(_column(flat), _bounds(values))
    return values


def _joinable(values: list[Any]) -> bool:
    """Whether values are arrays that can be put end to end and taken apart again."""
    if not all(isinstance(value, np.ndarray) and value.ndim for value in values):
        return False
    return len({(value.dtype, value.shape[1:]) for value in values}) == 1


def _one_dataclass(values: list[Any]) -> bool:
    return bool(values) and is_dataclass(values[0]) and len({type(v) for v in values}) == 1


def _bounds(values: list[Any]) -> tuple[int, ...]:
    return tuple(accumulate((len(value) for value in values), initial=0))


def _values(column: Any) -> list[Any]:
    match column:
        case Joined(joined, bounds):
            return [joined[a:b] for a, b in pairwise(bounds)]
        case Table(columns):
            rows = zip(*(_values(some) for some in columns.values()), strict=True)
            return [dict(zip(columns, row, strict=True)) for row in rows]
        case Rows(kind, columns):
            return unpack(kind, columns)
        case Runs(inner, bounds):
            flat = _values(inner)
            return [tuple(flat[a:b]) for a, b in pairwise(bounds)]
    values: list[Any] = column
    return values
