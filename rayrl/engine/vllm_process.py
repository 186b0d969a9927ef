"""vLLM inside a process of ours: its environment, its quirks, and how weights come in."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

from rayrl.weights import Loadable

# Read by vLLM when it is imported, so they are set before.
_ENVIRONMENT = {
    # One process: an engine lives and dies with its actor, and loads in a fraction of the time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Several engines share a host; vLLM would bind all of them to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The weight transfer is our own, so nothing is looked up on a network.
    "HF_HUB_OFFLINE": "1",
}
TRANSFER_BACKEND = "rayrl"
"""The name under which vLLM knows our way of loading weights."""


def silence_thread_warnings() -> None:
    """On CPU vLLM replaces torch.set_num_threads by a stub that logs a warning at every step, and
    warns of every layer that a partial update leaves alone."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads = lambda num_threads: None  # type: ignore[assignment]
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


def import_vllm() -> tuple[Any, Any]:
    """Import vLLM with the environment that an in-process engine needs; register the transfer."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import torch

    if not torch.cuda.is_available():
        # Otherwise the first request with log-probs compiles one helper for many seconds.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from vllm import LLM, SamplingParams

    _register_transfer()
    _let_vllm_scan_llvmlite()
    return LLM, SamplingParams


def _let_vllm_scan_llvmlite() -> None:
    """vLLM on CPU looks at ``vars()`` of everything in every module.  llvmlite, which numba
    brings, has a library object that answers any name, ``__dict__`` too, with a C function; the
    scan then ends in an AttributeError.  Give it an empty one."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab["__dict__"] = {}


def _register_transfer() -> None:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    if TRANSFER_BACKEND in WeightTransferEngineFactory._registry:
        return

    @dataclass
    class Init(WeightTransferInitInfo):
        """Nothing to agree on: the weights come as an argument."""

    @dataclass
    class Update(WeightTransferUpdateInfo):
        """One whole version."""

        weights: Loadable

    class HostTransfer(WeightTransferEngine[Init, Update]):
        """Loads checkpoint-format tensors that are already in this process's memory, through
        vLLM's own reload lifecycle (kernels on CPU pack their weights, so copying into parameters
        would be wrong)."""

        init_info_cls = Init
        update_info_cls = Update

        def init_transfer_engine(self, init_info: Init) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Update) -> None:
            self.model.load_weights(update_info.weights.tensors())  # type: ignore[operator]

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, HostTransfer)
