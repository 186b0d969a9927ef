"""Who waits for whom: a Chrome trace of a run, for chrome://tracing or https://ui.perfetto.dev.

A lane a worker and one for the driver; what a worker did is timed in the worker.  All spans carry
wall-clock time, so that on several machines lanes are as far apart as their clocks are.

The format is the JSON array form of the Trace Event Format: complete events ("ph": "X") with
microseconds, and metadata events ("M") that name processes and threads.
"""

from __future__ import annotations

import functools
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

DRIVER = "driver"
_KEPT = 1000
P = ParamSpec("P")
R = TypeVar("R")


class Span(NamedTuple):
    """Something that took ``seconds`` from ``started`` (seconds since the epoch) on."""

    name: str
    started: float
    seconds: float


class Traced:
    """A worker that remembers its latest calls: those of methods marked with :func:`traced`."""

    def take_spans(self) -> list[Span]:
        """The calls since this was last asked, at most the last 1,000."""
        return list(self.__dict__.pop("_spans", ()))


def traced(method: Callable[P, R]) -> Callable[P, R]:
    """Mark a method of a :class:`Traced` class: its calls are remembered, for about 1 µs each."""

    @functools.wraps(method)
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        started, clock = time.time(), time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spans = args[0].__dict__.setdefault("_spans", deque(maxlen=_KEPT))  # type: ignore[attr-defined]
            spans.append(Span(method.__name__, started, time.perf_counter() - clock))

    return timed


class TraceFile:
    """Writes trace.json: an event a line, readable even when the run was killed."""

    def __init__(self, file: Path) -> None:
        self._out = file.open("w", encoding="utf-8")
        self._out.write("[\n")
        self._lanes: dict[str, tuple[int, int]] = {}
        self._processes: dict[str, int] = {}
        self._driver: list[Span] = []
        self._end = json.dumps(_named("process_name", 0, 0, "rayrl")) + "\n]\n"

    def phase(self, name: str, started: float, seconds: float) -> None:
        """A phase of the driver, inside the step that ends next."""
        self._driver.append(Span(name, started, seconds))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """End a step: it encloses the phases since the last one."""
        if not self._driver:
            return
        first = min(span.started for span in self._driver)
        last = max(span.started + span.seconds for span in self._driver)
        self.spans(DRIVER, [Span(f"step {step}", first, last - first), *self._driver])
        self._driver = []
        self._out.flush()

    def spans(self, lane: str, spans: list[Span]) -> None:
        """Write what a worker did; lanes are named like ``rollout worker 0``."""
        process, thread = self._lane(lane)
        for span in spans:
            self._write(
                {
                    "name": span.name,
                    "cat": "rayrl",
                    "ph": "X",
                    "ts": span.started * 1e6,
                    "dur": span.seconds * 1e6,
                    "pid": process,
                    "tid": thread,
                }
            )

    def close(self) -> None:
        """End the file.  A second call does nothing."""
        if not self._out.closed:
            self._out.write(self._end)
            self._out.close()

    def _lane(self, lane: str) -> tuple[int, int]:
        """The process (the kind of worker) and thread (its number) that stand for a lane."""
        if lane not in self._lanes:
            kind, _, number = lane.rpartition(" ")
            kind, thread = (kind, int(number)) if number.isdigit() else (lane, 0)
            if kind not in self._processes:
                self._processes[kind] = len(self._processes) + 1
                self._write(_named("process_name", self._processes[kind], 0, kind))
            self._lanes[lane] = self._processes[kind], thread
            self._write(_named("thread_name", *self._lanes[lane], lane))
        return self._lanes[lane]

    def _write(self, event: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(event) + ",\n")


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
