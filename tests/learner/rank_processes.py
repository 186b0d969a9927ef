"""Two processes that stay, to be the ranks of one learner after another, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from rayrl.learner.parallel import join, open_store

TIMEOUT_S = 120.0


class RankProcesses:
    """``run`` calls a function on every rank at once, with its :class:`Ranks` first."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._stack = ExitStack()
        self._pools = [
            self._stack.enter_context(ProcessPoolExecutor(1, mp_context=context))
            for _ in range(size)
        ]

    def run(self, mode: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        store = open_store("127.0.0.1", len(self._pools), timeout_s=TIMEOUT_S)
        # The processes start here.  vLLM on a CPU turns the compiler off where it was loaded, and
        # what starts from there would have it off as well.
        with mock.patch.dict(os.environ):
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
            futures = [
                pool.submit(_on_rank, store.port, rank, len(self._pools), mode, function, arguments)
                for rank, pool in enumerate(self._pools)
            ]
        return [future.result(timeout=2 * TIMEOUT_S) for future in futures]

    def arrive(self, late_s: float, *, timeout_s: float) -> list[float]:
        """Have rank 1 come to the others so late; what ranks that wait for ``timeout_s`` in a
        collective then make of the sum of 1, 2 and so on."""
        size = len(self._pools)
        store = open_store("127.0.0.1", size, timeout_s=TIMEOUT_S)
        futures = [
            pool.submit(_arrive, store.port, rank, size, late_s if rank == 1 else 0.0, timeout_s)
            for rank, pool in enumerate(self._pools)
        ]
        return [future.result(timeout=2 * TIMEOUT_S) for future in futures]

    def close(self) -> None:
        self._stack.close()


def _on_rank(
    port: int, rank: int, size: int, mode: Any, function: Callable[..., Any], arguments: Any
) -> Any:
    torch.set_num_threads(1)
    ranks = join(
        "127.0.0.1",
        port,
        rank=rank,
        size=size,
        mode=mode,
        start_timeout_s=TIMEOUT_S,
        timeout_s=TIMEOUT_S,
    )
    try:
        return function(ranks, *arguments)
    finally:
        torch.distributed.destroy_process_group()


def _arrive(port: int, rank: int, size: int, late_s: float, timeout_s: float) -> float:
    time.sleep(late_s)
    ranks = join(
        "127.0.0.1",
        port,
        rank=rank,
        size=size,
        mode="data",
        start_timeout_s=TIMEOUT_S,
        timeout_s=timeout_s,
    )
    try:
        return ranks.total(torch.tensor(1.0 + rank)).item()
    finally:
        torch.distributed.destroy_process_group()
