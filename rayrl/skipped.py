"""What the driver keeps of a step that the learner could not take."""

from __future__ import annotations

import shutil
from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rayrl import cli
from rayrl.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from rayrl.config import Config
from rayrl.types import StepReport

_KEEP = 3

Use = Callable[[Checkpoint], Path]


class Skipped:
    """Says and keeps what was skipped, and ends a run in which it goes on.

    folder: the run's; say: tells a person
    """

    def __init__(self, folder: Path, config: Config, say: Callable[[str], None]) -> None:
        self._folder, self._config, self._say = folder, config, say

    def check(self, report: StepReport, fetch: Callable[[Use], Path]) -> None:
        """Say why a step was skipped and keep its batch, which ``fetch`` gets from the learner for
        the function that keeps it.

        Raises RuntimeError with the first cause after ``learner.max_skipped`` in a row."""
        if not report.problem:
            return
        why = f"step {report.step}: an optimizer step was skipped: {report.problem}"
        try:
            place = fetch(lambda replay: save_replay(self._folder, replay, self._config))
            self._say(f"{why}; look at it with --replay {place}")
        except OSError as error:
            self._say(f"{why}; its batch could not be kept: {error}")
        row = report.metrics["learner/skipped_in_a_row"]
        if row >= self._config.learner.max_skipped:
            raise RuntimeError(
                f"{row:.0f} optimizer steps in a row had no finite loss and gradient "
                f"(learner.max_skipped); the first: {report.first_problem}"
            )


def save_replay(folder: Path, replay: Checkpoint, config: Config) -> Path:
    """Write ``replay/step_N`` in a run's folder, and keep of those that were written before the
    newest two.  By time: after a resume from an earlier step the newest has not the highest N."""
    text = np.frombuffer(cli.dump(config).encode(), np.uint8)
    files = ChainMap({cli.REPLAY_CONFIG: text}, replay.model_files)  # type: ignore[arg-type]
    replays = folder / "replay"
    steps = {replay.step, *list_checkpoints(replays)}
    place = save_checkpoint(replays, replace(replay, model_files=files), keep=len(steps))
    others = [replays / f"step_{step}" for step in steps - {replay.step}]
    others.sort(key=lambda other: other.stat().st_mtime_ns)
    for old in others[: 1 - _KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return place
