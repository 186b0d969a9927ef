"""Optimizer steps that are skipped, and how many in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Streak:
    """Counts skipped optimizer steps.  A streak goes on from one step to the next, and several may
    lie within a step, of which the longest decides whether a run can go on.

    skipped: those of this step; first: why the first of them was skipped
    longest: length of the longest streak that this step had a part in, counted from its beginning;
        cause: why that began
    """

    def __init__(self) -> None:
        self._length, self._cause = 0, ""
        self.begin_step()

    def begin_step(self) -> None:
        self.skipped, self.first = 0, ""
        self.longest, self.cause = 0, ""

    def skip(self, problem: str) -> None:
        """An optimizer step was skipped."""
        self.first = self.first or problem
        self.skipped += 1
        self._length += 1
        self._cause = self._cause or problem
        if self._length > self.longest:
            self.longest, self.cause = self._length, self._cause

    def end(self) -> None:
        """An optimizer step was taken."""
        self._length, self._cause = 0, ""

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of the streak that goes on."""
        return {"skipped_in_a_row": self._length, "skipped_cause": self._cause}

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Inverse of :meth:`meta`; checkpoints of before may lack it."""
        self._length = int(meta.get("skipped_in_a_row", 0))
        self._cause = str(meta.get("skipped_cause", ""))
