"""Arrays by name on their way through Ray's object store, a piece at a time.

A checkpoint is several times as large as its model.  As one object it would have to fit into the
store and the memory of every machine that it passes, of which the driver's may be small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from rayrl.checkpoint import Checkpoint, split

PIECE_BYTES = 2**29
"""About how many bytes of arrays are one object."""


class Pieces(Mapping[str, np.ndarray]):
    """Arrays that lie in the object store, each got when it is asked for: read them, never write.
    The piece that was asked for last is held, so ask in their order.

    where: the name of every array, and the reference to the piece that holds it
    """

    def __init__(self, where: Mapping[str, Any]) -> None:
        self._where = dict(where)
        self._held: tuple[Any, Mapping[str, np.ndarray]] = (None, {})

    def __getitem__(self, name: str) -> np.ndarray:
        piece = self._where[name]
        if self._held[0] != piece:
            self._held = (None, {})  # before the next one comes
            self._held = (piece, ray.get(piece))
        return self._held[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pieces, (self._where,)


def in_pieces(arrays: Mapping[str, np.ndarray], *, emptied: bool = False) -> Pieces:
    """Put arrays into the object store, where they stay while this is held.  A dictionary can be
    ``emptied`` on the way, that they are not in memory twice."""
    where: dict[str, Any] = {}
    for part in split(arrays, PIECE_BYTES):
        piece = ray.put(part)
        where |= dict.fromkeys(part, piece)
        if emptied and isinstance(arrays, dict):
            for name in part:
                del arrays[name]
    return Pieces(where)


def shipped(checkpoint: Checkpoint, *, emptied: bool = False) -> Checkpoint:
    """The same checkpoint, to be sent as an argument or a result."""
    return replace(
        checkpoint,
        model_files=in_pieces(checkpoint.model_files, emptied=emptied),
        arrays=in_pieces(checkpoint.arrays, emptied=emptied),
    )
