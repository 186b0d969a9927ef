"""Collecting what the workers did for the trace, without waiting for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from rayrl.trace import TraceFile

_LAST_WAIT_S = 10.0


class Tracer:
    """Asks workers (actors by name, those that ``sources`` give at that moment) for their spans
    after each step, and writes them to ``folder``/trace.json; does nothing where that is None.

    A worker that is busy answers later; one that died, or was ended without :meth:`collect`, takes
    its latest spans along.
    """

    def __init__(self, folder: Path | None, *sources: Callable[[], Mapping[str, Any]]) -> None:
        self._file = TraceFile(folder / "trace.json") if folder else None
        self._sources = sources
        self._asked: dict[Any, str] = {}

    def phase(self, name: str, started: float, seconds: float) -> None:
        """Hear of a phase of the driver."""
        if self._file:
            self._file.phase(name, started, seconds)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """End a step of the driver and collect what workers have answered so far."""
        if self._file:
            self._file.step(step, metrics)
            self._collect(self._file, waiting=set(self._asked.values()), timeout_s=0.0)

    def collect(self) -> None:
        """Wait for what workers have done until now; before any of them is ended."""
        if self._file:
            # Also those that have not answered yet: they were asked before their latest calls.
            self._collect(self._file, waiting=set(), timeout_s=_LAST_WAIT_S)

    def close(self) -> None:
        """Collect the rest and end the file; before the workers are killed.  A second call does
        nothing."""
        self.collect()
        if self._file:
            file, self._file = self._file, None
            file.close()

    def _collect(self, file: TraceFile, *, waiting: set[str], timeout_s: float) -> None:
        workers = itertools.chain(*(source().items() for source in self._sources))
        for lane, actor in workers:
            if lane not in waiting:
                self._asked[actor.take_spans.remote()] = lane
        refs = list(self._asked)
        for ref in ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0]:
            lane = self._asked.pop(ref)
            try:
                file.spans(lane, ray.get(ref))
            except RayError:
                continue  # the worker died
