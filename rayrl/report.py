"""report.html: a run on one page, self-contained and readable offline."""

from __future__ import annotations

from pathlib import Path


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from what the run has left there so far; returns its path."""
    raise NotImplementedError
