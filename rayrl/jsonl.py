"""Files of one JSON object a line, and files that are replaced whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class JsonlFile:
    """A file that grows by whole lines, flushed after each call.

    What storage refuses (a full disk) is taken back to the last whole line and waits in memory; it
    is written, in order, by the next call that can.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._waiting: list[Row] = []

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows, after those that wait.  On OSError they wait too."""
        self._waiting += rows
        self.flush()

    def replace(self, rows: Sequence[Row]) -> None:
        """Have these rows and no others, whole or not at all."""
        write_atomically(self._file, lines(rows))
        self._waiting.clear()

    def flush(self) -> None:
        """Write what waits.  OSError where storage still refuses."""
        if not self._waiting:
            return
        end = self._file.stat().st_size if self._file.exists() else 0
        try:
            # A lone surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it.
            with self._file.open("a", encoding="utf-8", errors="backslashreplace") as out:
                out.write(lines(self._waiting))
        except OSError:
            with suppress(OSError):
                os.truncate(self._file, end)
            raise
        self._waiting.clear()

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far, those that wait too, as they are read back."""
        waiting = [json.loads(lines([row])) for row in self._waiting]
        return [*read_jsonl(self._file), *waiting]


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line; none when there is no file.

    A last line that does not end is what a killed run leaves behind, and is left out.
    Raises ValueError with the file and line number for anything else that is not an object.
    """
    if not file.is_file():
        return []
    *whole, _unfinished = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: want an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def write_atomically(file: Path, text: str) -> None:
    """Replace ``file`` by ``text``: whoever reads it sees the old one or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def lines(rows: Sequence[Row]) -> str:
    """Rows as lines."""
    return "".join(
        json.dumps(json_value(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows
    )


def json_value(value: Any) -> Any:
    """The value with every float that JSON cannot say replaced by None."""
    if isinstance(value, Mapping):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
