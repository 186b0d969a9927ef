"""Metrics of a step: weighted means over its micro-batches, under the names people look for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
        self._added: list[tuple[str, Any, Any]] = []

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Add ``{name: (sum, weight)}``, numbers or tensors of one element.  Tensors are read when
        somebody asks: to read one, a GPU must have done all that it was given before."""
        for name, pair in metrics.items():
            total, weight = (x.detach() if isinstance(x, Tensor) else x for x in pair)
            self._added.append((name, total, weight))

    def pairs(self) -> dict[str, tuple[float, float]]:
        """Every ``{name: (sum, weight)}`` so far."""
        self._read()
        return {name: (total, self._weights[name]) for name, total in self._totals.items()}

    def means(self) -> dict[str, float]:
        """Each metric with any weight, under the objective's own name."""
        self._read()
        return {k: v / self._weights[k] for k, v in self._totals.items() if self._weights[k]}

    def _read(self) -> None:
        added, self._added = self._added, []
        numbers = iter(_numbers([x for _, *pair in added for x in pair]))
        for name, *_ in added:
            self._totals[name] += next(numbers)
            self._weights[name] += next(numbers)


def _numbers(values: Sequence[Any]) -> list[float]:
    """Numbers and tensors of one element as numbers, read once for each type of tensor."""
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    places: dict[tuple[Any, Any], list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            places[value.device, value.dtype].append(place)
    for of_type in places.values():
        read = torch.stack([values[place].reshape(()) for place in of_type]).tolist()
        for place, number in zip(of_type, read, strict=True):
            numbers[place] = float(number)
    return numbers


def short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The diagnostics that every run is read by, under the names that people look for."""
    return {_SHORT_NAMES.get(name, name): value for name, value in metrics.items()}
