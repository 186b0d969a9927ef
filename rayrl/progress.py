"""The line that a person watches: updated in place on a terminal, one a step in a plain log."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_PHASE = "seconds/"
_PHASES = [_PHASE + name for name in ("rollout", "reward", "learner", "sync", "eval")]
"""In the order in which a batch goes through them, which is not that of a step's first seconds."""


class Progress(Protocol):
    """Where the line goes."""

    def update(self, fraction: float, text: str, *, stay: bool) -> None:
        """Show ``text`` for the step just done; ``stay`` marks lines worth scrolling back to."""

    def stay(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """End the display; a second call does nothing."""


def open_progress() -> Progress:
    """The display that suits standard output."""
    return TerminalProgress(Console()) if sys.stdout.isatty() else PlainProgress()


def progress_text(
    step: int,
    total: int,
    metrics: Mapping[str, float],
    *,
    score: float,
    gain: float,
    seconds_left: float,
) -> str:
    """A step in one line, the most watched numbers first, for a narrow terminal cuts the end.

    What is not known (NaN) is left out.

    ``score`` is the last held-out CIDEr-D (x100) and ``gain`` its change against the first.
    """
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    if "reward/mean" in metrics:
        parts.append(f"reward {metrics['reward/mean']:.3f}")
    if not math.isnan(score):
        change = f" ({gain:+.1f})" if step > 0 else ""
        parts.append(f"CIDEr-D {score:.1f}{change}")
    if "kl" in metrics:
        parts.append(f"KL {metrics['kl']:.4f}")
    if "captions_per_second" in metrics:
        parts.append(f"{metrics['captions_per_second']:.0f} captions/s")
    if not math.isnan(seconds_left) and step < total:
        parts.append(f"ETA {duration(seconds_left)}")
    measured = [name for name in metrics if name.startswith(_PHASE) and name not in _PHASES]
    phases = [
        f"{name.removeprefix(_PHASE)} {metrics[name]:.2f}"
        for name in (*_PHASES, *measured)
        if name in metrics
    ]
    if phases:
        parts.append(f"{' '.join(phases)} s")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a clock shows them: ``0:07``, ``12:34``, ``1:02:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def show(write: Callable[[], None]) -> None:
    """Write to standard output, if that can be: a full disk under a job's log, or a reader that
    went away, is no reason to end a run.  Nor is a signal in the middle of another line, whose
    handler may not write."""
    with suppress(OSError, RuntimeError):
        write()


class PlainProgress:
    """One line a step, flushed, for logs and pipes."""

    def update(self, fraction: float, text: str, *, stay: bool) -> None:
        show(lambda: print(text, flush=True))

    def stay(self, text: str) -> None:
        show(lambda: print(text, flush=True))

    def close(self) -> None:
        pass


class TerminalProgress:
    """A bar and the step beside it, updated in place; evaluations and messages stay above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._pending = Text()
        self._live.start()

    def update(self, fraction: float, text: str, *, stay: bool) -> None:
        line = Text(text, no_wrap=True, overflow="ellipsis")
        if stay:
            self.stay(text)
        self._pending = Text() if stay else line
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=1.0, completed=fraction, width=16), line)
        show(lambda: self._live.update(row))

    def stay(self, text: str) -> None:
        # Text, not a string: captions and paths are not rich markup.
        show(lambda: self._console.print(Text(text)))

    def close(self) -> None:
        if self._live.is_started:
            show(self._live.stop)
            if self._pending:
                show(lambda: self._console.print(self._pending))
