"""A run's numbers as Ray metrics, which Prometheus scrapes from every node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from rayrl.telemetry import SERIES, samples


class RayMetrics:
    """Exports each logged step; ``run`` labels the series, so that runs of one cluster differ."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}
        for series in SERIES:
            labels = ("run", series.label) if series.label else ("run",)
            # Ray adds the ending of a counter's name itself.
            kind, name = {
                "gauge": (Gauge, series.name),
                "counter": (Counter, series.name.removesuffix("_total")),
            }[series.kind]
            self._metrics[series.name] = kind(name, series.description, tag_keys=labels)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges to a step's values, and let the counters grow by them."""
        for series, labels, value in samples(step, metrics):
            metric, tags = self._metrics[series.name], {"run": self._run, **labels}
            if series.kind == "gauge":
                metric.set(value, tags=tags)
            elif value > 0:  # a counter refuses 0
                metric.inc(value, tags=tags)
