"""Metrics of a step: weighted means over its micro-batches, under the names people look for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

_SHORT_NAMES = {
    "objective/kl_k3": "kl",
    "objective/entropy": "entropy",
    "objective/mismatch_kl": "mismatch_kl",
    "objective/clip_low": "learner/clip_low_fraction",
    "objective/clip_high": "learner/clip_high_fraction",
}


class Means:
    """Sums of metrics and of their weights, added up over micro-batches."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Add ``{name: (sum, weight)}``."""
        for name, (total, weight) in metrics.items():
            self._totals[name] += float(total)
            self._weights[name] += float(weight)

    def pairs(self) -> dict[str, tuple[float, float]]:
        """Every ``{name: (sum, weight)}`` so far."""
        return {name: (total, self._weights[name]) for name, total in self._totals.items()}

    def means(self) -> dict[str, float]:
        """Each metric with any weight, under the objective's own name."""
        return {k: v / self._weights[k] for k, v in self._totals.items() if self._weights[k]}


def short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The diagnostics that every run is read by, under the names that people look for."""
    return {_SHORT_NAMES.get(name, name): value for name, value in metrics.items()}
