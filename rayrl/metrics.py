"""What a run writes while it goes: a progress line, metrics.jsonl, samples.jsonl, TensorBoard.

The driver is the only writer.  Both files hold one JSON object a line and are flushed after each,
so that a run that dies loses nothing, and a resumed run holds every step exactly once.  A full disk
costs no line: they wait in memory until there is room.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rayrl.jsonl import JsonlFile, json_value, lines, read_jsonl, write_atomically
from rayrl.progress import Progress, open_progress, progress_text

EVAL_METRIC = "eval/cider_d"
EVAL_SET = "eval/set"
"""In a row with a score: which held-out set it is of."""
_METRICS, _SAMPLES = "metrics.jsonl", "samples.jsonl"


class Phases:
    """Seconds by phase: ``with phases("rollout"): …``, then :meth:`take`.

    A phase that runs twice adds up; one that raises is counted as far as it came.  ``listener``
    hears of each: its name, when it started (seconds since the epoch) and its seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        listener: Callable[[str, float, float], None] | None = None,
    ) -> None:
        self._clock = clock
        self._listener = listener
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        since_epoch, started = time.time(), self._clock()
        try:
            yield
        finally:
            spent = self._clock() - started
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent
            if self._listener is not None:
                self._listener(phase, since_epoch, spent)

    def take(self) -> dict[str, float]:
        """``{"seconds/<phase>": seconds}`` since the last call, which starts again from nothing."""
        taken = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


class StepSink(Protocol):
    """Something that is told of every logged step: exported metrics, a trace."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """The log of one run folder; ``also`` hears of each step too.

    ``scores`` are the held-out ones so far, by step; those from here on are of the held-out set
    ``heldout``, and compare with none of another.  ``last_step`` is the newest that was logged.

    ``resume_from=k`` continues after step k: what the run before wrote between its last
    checkpoint and its end is dropped.  Without it the log starts empty.
    Raises ValueError when the folder's files are not what a run writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        tensorboard: bool = True,
        resume_from: int | None = None,
        heldout: str = "",
        also: Sequence[StepSink] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        keep = -1 if resume_from is None else resume_from
        self._files: dict[str, JsonlFile] = {}
        for name in (_METRICS, _SAMPLES):
            _keep_steps(folder / name, keep)
            self._files[name] = JsonlFile(folder / name)
        self._refused: set[str] = set()
        self._heldout, self._other_set = heldout, False
        self.scores = scores_of(self.history())
        self._total, self.last_step = total_steps, keep
        self._sinks = [*also, *([TensorBoard(folder)] if tensorboard else [])]
        self._clock = clock
        self._started: tuple[int, float] | None = None
        self._progress: Progress = open_progress()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step.  A value that is not finite is written as null, and said so.

        Raises ValueError for a step that is not after the last one.
        """
        if step <= self.last_step:
            raise ValueError(f"step {step} after step {self.last_step}: steps only go up")
        self.last_step = step
        now = self._clock()
        row: dict[str, Any] = {"step": step, "time": now, **metrics}
        if self._heldout and EVAL_METRIC in metrics:
            row[EVAL_SET] = self._heldout
        self.attempt(_METRICS, lambda: self._files[_METRICS].append([row]))
        for name, value in metrics.items():
            if not math.isfinite(value):
                self.message(f"step {step}: {name} is {value}")
        for sink in self._sinks:
            self.attempt(type(sink).__name__, functools.partial(sink.step, step, metrics))
        self._show(step, metrics, now)

    def resumed(self, heldout: str) -> None:
        """The run that this one resumes had the held-out set ``heldout`` ("": not known, taken for
        this one's): scores that do not say of which they are, by an earlier version, are of that.

        Says where this one's is another."""
        rows, known = self._files[_METRICS].rows(), heldout or self._heldout
        scored = [row for row in rows if row.get(EVAL_METRIC) is not None]
        if known and any(EVAL_SET not in row for row in scored):
            for row in scored:
                row.setdefault(EVAL_SET, known)
            self.attempt(_METRICS, lambda: self._files[_METRICS].replace(rows))
        self.scores = scores_of(rows)
        last = scored[-1].get(EVAL_SET, "") if scored else self._heldout
        self._other_set = last != self._heldout
        if self._other_set:
            self.message(
                f"the held-out set is another, {self._heldout}, was {last}: its scores are not "
                "compared with those before"
            )

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append groups to samples.jsonl; each record holds at least its ``step``."""
        self.attempt(_SAMPLES, lambda: self._files[_SAMPLES].append(records))

    def flush(self) -> None:
        """Write what waits for room.  OSError where there still is none."""
        for file in self._files.values():
            file.flush()

    def attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write something that the run can go on without; where storage refuses (a full disk), say
        so once, until it accepts again."""
        try:
            write()
        except OSError as error:
            if what not in self._refused:
                self.message(f"{what} cannot be written: {error}; going on")
            self._refused.add(what)
        else:
            self._refused.discard(what)

    def message(self, text: str) -> None:
        """Say something once, above the progress line."""
        self._progress.stay(text)

    def history(self) -> list[dict[str, Any]]:
        """The steps so far, those before a resume too, without values that were not finite."""
        return [
            {name: value for name, value in row.items() if value is not None}
            for row in self._files[_METRICS].rows()
        ]

    def close(self) -> None:
        """Write what waits, take the progress line away and close what hears of each step.

        A second call does nothing."""
        for name, file in self._files.items():
            self.attempt(name, file.flush)
        for sink in self._sinks:
            self.attempt(type(sink).__name__, sink.close)
        self._progress.close()

    def _show(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        evaluated = EVAL_METRIC in metrics
        if evaluated and self._other_set:
            self.scores, self._other_set = scores_of(self.history()), False
        elif evaluated:
            self.scores[step] = metrics[EVAL_METRIC]
        scores = list(self.scores.values()) or [math.nan]
        # Counted from the first logged step, so that start-up does not pass for slow steps.
        self._started = self._started or (step, now)
        done, spent = step - self._started[0], now - self._started[1]
        left = spent / done * (self._total - step) if done else math.nan
        text = progress_text(
            step,
            self._total,
            metrics,
            score=scores[-1],
            gain=scores[-1] - scores[0],
            seconds_left=left,
        )
        self._progress.update(step / self._total, text, stay=evaluated)


def scores_of(history: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The held-out scores in the rows of metrics.jsonl, by step: those of the same held-out set as
    the last one, for others do not compare."""
    rows = [row for row in history if row.get(EVAL_METRIC) is not None]
    return {
        int(row["step"]): float(row[EVAL_METRIC])
        for row in rows
        if row.get(EVAL_SET) == rows[-1].get(EVAL_SET)
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json: whole or not at all.  Values that are not finite become null."""
    text = json.dumps(json_value(summary), indent=1, allow_nan=False)
    write_atomically(folder / "summary.json", text + "\n")


def _keep_steps(file: Path, last: int) -> None:
    """Leave the lines of steps up to ``last`` in a file, and none that is broken off."""
    if not file.is_file():
        return
    rows = read_jsonl(file) if last >= 0 else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{file}, line {number}: want a step, got {row.get('step')!r}")
    write_atomically(file, lines([row for row in rows if row["step"] <= last]))


class TensorBoard:
    """TensorBoard events.  A writer hides what earlier event files of the folder say of its steps;
    one that failed (its thread ends with it) is left, and another begun with the next step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer, self._writer = self._writer, None
        writer = writer or SummaryWriter(str(self._folder), purge_step=step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()
        self._writer = writer

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
