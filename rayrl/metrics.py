"""What a run writes while it goes: a progress line, metrics.jsonl, samples.jsonl, TensorBoard.

The driver is the only writer.  Both files hold one JSON object a line and are flushed after each,
so that a run that dies loses nothing, and a resumed run holds every step exactly once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rayrl.progress import Progress, open_progress, progress_text

EVAL_METRIC = "eval/cider_d"


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


class RunLog:
    """The log of one run folder; ``also`` hears of each step too.

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
        also: Sequence[StepSink] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_file = folder / "metrics.jsonl"
        self._samples_file = folder / "samples.jsonl"
        keep = -1 if resume_from is None else resume_from
        for file in (self._metrics_file, self._samples_file):
            _keep_steps(file, keep)
        scores = [row[EVAL_METRIC] for row in self.history() if EVAL_METRIC in row]
        self._first_score = scores[0] if scores else math.nan
        self._last_score = scores[-1] if scores else math.nan
        self._total, self._last_step = total_steps, keep
        self._also = also
        self._clock = clock
        self._started: tuple[int, float] | None = None
        self._tensorboard = _open_tensorboard(folder, keep + 1) if tensorboard else None
        self._progress: Progress = open_progress()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step.  A value that is not finite is written as null, and said so.

        Raises ValueError for a step that is not after the last one.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: steps only go up")
        self._last_step = step
        now = self._clock()
        _append(self._metrics_file, [{"step": step, "time": now, **metrics}])
        for name, value in metrics.items():
            if not math.isfinite(value):
                self.message(f"step {step}: {name} is {value}")
            if self._tensorboard is not None:
                self._tensorboard.add_scalar(name, value, step)
        if self._tensorboard is not None:
            self._tensorboard.flush()
        for sink in self._also:
            sink.step(step, metrics)
        self._show(step, metrics, now)

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append groups to samples.jsonl; each record holds at least its ``step``."""
        _append(self._samples_file, records)

    def message(self, text: str) -> None:
        """Say something once, above the progress line."""
        self._progress.stay(text)

    def history(self) -> list[dict[str, float]]:
        """The steps so far, those before a resume too, without values that were not finite."""
        return [
            {name: value for name, value in row.items() if value is not None}
            for row in read_jsonl(self._metrics_file)
        ]

    def close(self) -> None:
        """Take the progress line away and end the event file.  A second call does nothing."""
        self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _show(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        evaluated = EVAL_METRIC in metrics
        if evaluated:
            self._last_score = metrics[EVAL_METRIC]
            if math.isnan(self._first_score):
                self._first_score = self._last_score
        # Counted from the first logged step, so that start-up does not pass for slow steps.
        self._started = self._started or (step, now)
        done, spent = step - self._started[0], now - self._started[1]
        left = spent / done * (self._total - step) if done else math.nan
        text = progress_text(
            step,
            self._total,
            metrics,
            score=self._last_score,
            gain=self._last_score - self._first_score,
            seconds_left=left,
        )
        self._progress.update(step / self._total, text, stay=evaluated)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json: whole or not at all.  Values that are not finite become null."""
    text = json.dumps(_json_value(summary), indent=1, allow_nan=False)
    write_atomically(folder / "summary.json", text + "\n")


def write_atomically(file: Path, text: str) -> None:
    """Replace ``file`` by ``text``: whoever reads it sees the old one or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line; none when there is no file.

    A last line that does not end is what a killed run leaves behind, and is left out.
    Raises ValueError with the file and line number for anything else that is not an object.
    """
    if not file.is_file():
        return []
    *lines, _unfinished = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: want an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _keep_steps(file: Path, last: int) -> None:
    """Leave the lines of steps up to ``last`` in a file, and none that is broken off."""
    if not file.is_file():
        return
    rows = read_jsonl(file) if last >= 0 else []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{file}, line {number}: want a step, got {row.get('step')!r}")
    write_atomically(file, _lines([row for row in rows if row["step"] <= last]))


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    # A lone surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it.
    with file.open("a", encoding="utf-8", errors="backslashreplace") as out:
        out.write(_lines(rows))


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(
        json.dumps(_json_value(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows
    )


def _json_value(value: Any) -> Any:
    """The value with every float that JSON cannot say replaced by None."""
    if isinstance(value, Mapping):
        return {name: _json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    """An event writer that hides what earlier event files of the folder say of its steps."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
