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

    def run(
        self,
        mode: str,
        function: Callable[..., Any],
        *arguments: Any,
        late_s: float = 0.0,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Any]:
        """``late_s``: how much later than the one before it each rank comes."""
        store = open_store("127.0.0.1", len(self._pools), timeout_s=TIMEOUT_S)
        # The processes start here.  vLLM on a CPU turns the compiler off where it was loaded, and
        # what starts from there would have it off as well.
        with mock.patch.dict(os.environ):
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
            futures = [
                pool.submit(
                    _on_rank,
                    function,
                    arguments,
                    late_s=rank * late_s,
                    address="127.0.0.1",
                    port=store.port,
                    rank=rank,
                    size=len(self._pools),
                    mode=mode,
                    start_timeout_s=TIMEOUT_S,
                    timeout_s=timeout_s,
                )
                for rank, pool in enumerate(self._pools)
            ]
        return [future.result(timeout=2 * TIMEOUT_S) for future in futures]

    def close(self) -> None:
        self._stack.close()


def _on_rank(function: Callable[..., Any], arguments: Any, *, late_s: float, **meeting: Any) -> Any:
    torch.set_num_threads(1)
    time.sleep(late_s)
    ranks = join(**meeting)
    try:
        return function(ranks, *arguments)
    finally:
        torch.distributed.destroy_process_group()
