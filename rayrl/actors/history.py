"""What led to the learner as it is: checkpoints, and the updates between and after them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Update = Sequence[Any]
"""References to the groups of a step and their prompts."""


class History:
    """How to get to the learner's step, and to up to ``back`` steps before it.

    step: updates until now, of a run that was resumed those before it included
    """

    def __init__(self, back: int) -> None:
        self._back = back
        self.begin(0, None)

    def begin(self, step: int, folder: Path | None) -> None:
        """The learner is at ``step``, as the checkpoint ``folder`` has it; None is the start."""
        self.step = step
        self._origins = {step: folder}
        self._updates: dict[int, Update] = {}

    def add(self, update: Update) -> None:
        """The learner has taken one more step."""
        self.step += 1
        self._updates[self.step] = update
        self._forget()

    def saved(self, folder: Path) -> None:
        """``folder`` holds a checkpoint of the learner as it is."""
        self._origins[self.step] = folder
        self._forget()

    def way(self) -> tuple[Path | None, list[Update]]:
        """The newest checkpoint, None for the start, and the updates since."""
        newest = max(self._origins)
        return self._origins[newest], self.since(newest)

    def way_to(self, step: int) -> tuple[Path | None, list[Update]] | None:
        """The same to an earlier step; None where no checkpoint from before it is left."""
        for origin in sorted(self._origins, reverse=True):
            folder = self._origins[origin]
            if origin <= step and (folder is None or folder.is_dir()):
                return folder, self._between(origin, step)
        return None

    def since(self, step: int) -> list[Update]:
        """The updates after ``step``, to which there is a way."""
        return self._between(step, self.step)

    def _between(self, first: int, last: int) -> list[Update]:
        return [self._updates[step] for step in range(first + 1, last + 1)]

    def _forget(self) -> None:
        """Let go of what only leads to earlier steps than anybody asks for."""
        wanted = max(self.step - self._back, min(self._origins))
        first = max(origin for origin in self._origins if origin <= wanted)
        self._origins = {step: where for step, where in self._origins.items() if step >= first}
        self._updates = {step: some for step, some in self._updates.items() if step > first}
