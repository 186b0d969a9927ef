"""What judges say of captions beside scores: constraints, versions, wrong spans."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from rayrl.rewards.term import Failure, Judged, Scores

Spans = tuple[tuple[tuple[int, int], ...], ...]
_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def satisfied(terms: Mapping[str, Scores], constraints: Mapping[str, str]) -> npt.NDArray[np.bool_]:
    """Whether each caption [G] satisfies all constraints, such as ``{"length": ">= 0"}``."""
    results = []
    for name, constraint in constraints.items():
        sign = constraint.rstrip("0123456789.- ")
        results.append(_COMPARE[sign](terms[name], float(constraint[len(sign) :])))
    return np.logical_and.reduce(results)  # type: ignore[no-any-return]


def judgements(
    answers: Mapping[str, Scores | Judged | Failure],
) -> tuple[dict[str, np.ndarray], Spans | None] | Failure:
    """From the terms' answers for a group: ``reward_versions`` [G] where a term gives versions, and
    for each caption the spans that any term calls wrong.  A failure where several terms give
    versions, of which no one number can tell."""
    judged = {name: answer for name, answer in answers.items() if isinstance(answer, Judged)}
    versions = {name: one.versions for name, one in judged.items() if one.versions is not None}
    if len(versions) > 1:
        return Failure(f"versions from several terms, {', '.join(versions)}, want one of them")
    fields: dict[str, np.ndarray] = {}
    if versions:
        (each,) = versions.values()
        fields["reward_versions"] = np.array(each, np.int64)
    spans = [one.wrong_spans for one in judged.values() if one.wrong_spans is not None]
    if not spans:
        return fields, None
    return fields, tuple(tuple(chain(*some)) for some in zip(*spans, strict=True))
