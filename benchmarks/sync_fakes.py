"""An engine that is nothing but the memory of its weights, for bench_sync.py."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from rayrl.engine.base import EngineSetup
from rayrl.weights import Weights

FOLDER_VARIABLE = "RAYRL_BENCH_SYNC_FOLDER"


class CopyingEngine:
    """Copies every version into arrays of its own and writes down what that took: a line of JSON
    a load, in a file of this process.

    ``shared_bytes`` lie in memory that the node's processes share; ``allocated_bytes`` is the most
    that Python and numpy took beyond, from the end of the last load to the end of this one.
    """

    def __init__(self, setup: EngineSetup) -> None:
        self._log = Path(os.environ[FOLDER_VARIABLE]) / f"{os.getpid()}.jsonl"
        self._own: dict[str, np.ndarray] = {}
        self.weight_version = -1
        tracemalloc.start(1)

    def held(self, weights: Weights) -> dict[str, Any]:
        return {}

    def load_weights(self, weights: Weights, **_: Any) -> None:
        started = time.perf_counter()
        weights.verify()
        copied = 0
        for name, array in weights.arrays.items():
            if name not in self._own:
                self._own[name] = np.zeros_like(array)
            np.copyto(self._own[name], array)
            copied += array.nbytes
        row = {
            "version": weights.version,
            "seconds": time.perf_counter() - started,
            "copied_bytes": copied,
            "shared_bytes": shared_bytes(list(weights.arrays.values())),
            "allocated_bytes": tracemalloc.get_traced_memory()[1] - self._kept(),
        }
        self.weight_version = weights.version
        tracemalloc.reset_peak()
        with self._log.open("a") as log:
            log.write(json.dumps(row) + "\n")

    def _kept(self) -> int:
        return sum(array.nbytes for array in self._own.values())


def shared_bytes(arrays: list[np.ndarray]) -> int:
    """Bytes of the arrays that lie in a mapping of /dev/shm, where Ray keeps its objects."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/shm/" in line:
            first, last = line.split()[0].split("-")
            spans.append((int(first, 16), int(last, 16)))
    total = 0
    for array in arrays:
        start = array.__array_interface__["data"][0]
        if any(a <= start and start + array.nbytes <= b for a, b in spans):
            total += array.nbytes
    return total


def install() -> None:
    """Replace the engine in this worker process, where actors find it by name."""
    import rayrl.engine.base

    rayrl.engine.base.make_engine = CopyingEngine  # type: ignore[assignment]
