"""A run's numbers as Ray metrics, which Prometheus scrapes from every node."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from rayrl.telemetry import SERIES, samples

_AGAIN_S = 1.0
"""Ray forgets a gauge that nobody has set for two of its report intervals, of a second or more."""


class RayMetrics:
    """Exports each logged step; ``run`` labels the series, so that runs of one cluster differ.
    Gauges keep the values of the last step that had them until :meth:`close`, however long the next
    one takes."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}
        self._last: dict[tuple[str, ...], tuple[Any, float, dict[str, str]]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        for series in SERIES:
            labels = ("run", series.label) if series.label else ("run",)
            # Ray adds the ending of a counter's name itself.
            kind, name = {
                "gauge": (Gauge, series.name),
                "counter": (Counter, series.name.removesuffix("_total")),
            }[series.kind]
            self._metrics[series.name] = kind(name, series.description, tag_keys=labels)
        self._thread = threading.Thread(target=self._keep, name="gauges", daemon=True)
        self._thread.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges to a step's values, and let the counters grow by them."""
        for series, labels, value in samples(step, metrics):
            metric, tags = self._metrics[series.name], {"run": self._run, **labels}
            if series.kind == "gauge":
                with self._lock:
                    self._last[series.name, *labels.values()] = (metric, value, tags)
                    metric.set(value, tags=tags)
            elif value > 0:  # a counter refuses 0
                metric.inc(value, tags=tags)

    def close(self) -> None:
        """Set no gauge any more; Ray forgets them."""
        self._closed.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._closed.wait(_AGAIN_S):
            with self._lock:
                for metric, value, tags in self._last.values():
                    metric.set(value, tags=tags)
