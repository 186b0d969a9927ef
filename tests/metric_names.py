"""The metrics that docs/observability.md lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "observability.md"


def listed() -> Iterator[tuple[str, str]]:
    """Each metric by its name in a run's files, and the name that a controller reads it by."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.partition("## Every metric")[2].partition("\n## ")[0]
    for cell in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE):
        named, _, read = cell.partition("(")
        names = re.findall(r"`(.+?)`", named)
        yield from zip(names, re.findall(r"`(.+?)`", read) or names, strict=False)


def not_listed(names: Iterable[str]) -> list[str]:
    """Those of a row's keys that the page does not list."""
    patterns = [re.sub("<.+>", r"\\w+", re.escape(name)) for name, _ in listed()]
    return [name for name in names if not re.fullmatch("|".join(patterns), name)]
