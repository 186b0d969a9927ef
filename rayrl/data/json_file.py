"""JSON files that come from elsewhere, plain or compressed by gzip."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

MAX_UNPACKED = 1024**3
"""Bytes of a compressed file when it is unpacked: some kilobytes can promise any number."""


class NamesTwice(dict[str, Any]):
    """A JSON object that says something twice; ``twice`` is the first such name."""

    twice: str


def read_json(path: Path) -> Any:
    """What the file holds; an object that has a name twice is a :class:`NamesTwice`.

    Raises OSError where it cannot be read, and ValueError, naming the file, where it is no JSON.
    """
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = _unpacked(path, data)
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: not UTF-8: byte 0x{byte:02x} at {error.start}") from None
    except ValueError as error:  # of numbers of too many digits too
        raise ValueError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    if len(unpacked) > MAX_UNPACKED:
        raise ValueError(f"{path}: unpacks to more than {MAX_UNPACKED} bytes")
    return unpacked


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    doubled = NamesTwice(found)
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            doubled.twice = name
            break
        seen.add(name)
    return doubled
