"""Several terms as one, more cautious than any of them (Coste et al. 2023, arXiv:2310.02743).

A single learned reward is soon over-optimised; members that disagree mark where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rayrl.rewards.term import Failure, Item, Scores, Term, scores_of

Rule = Callable[[Scores], Scores]
"""The scores of M members [M, G] to one score a caption [G]."""


def worst_case(members: Scores) -> Scores:
    """The least of the members' scores."""
    return members.min(axis=0)


def uncertainty_weighted(penalty: float) -> Rule:
    """The mean of the members minus ``penalty`` times their (population) variance."""
    return lambda members: members.mean(axis=0) - penalty * members.var(axis=0)


class EnsembleTerm:
    """``members`` by name, each with a factor that brings it to the common scale, under a rule.
    An item that one member cannot score is a failure."""

    def __init__(self, members: Mapping[str, tuple[Term, float]], rule: Rule) -> None:
        self._members = members
        self._rule = rule

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        by_member = {name: term.score(items) for name, (term, _) in self._members.items()}
        results: list[Scores | Failure] = []
        for i in range(len(items)):
            rows = []
            failures = []
            for name, (_, scale) in self._members.items():
                value = scores_of(by_member[name][i])
                if isinstance(value, Failure):
                    failures.append(Failure(f"{name}: {value.reason}"))
                else:
                    rows.append(scale * value)
            results.append(failures[0] if failures else self._rule(np.stack(rows)))
        return results
