"""What a step cost and how far it moved: update size, peak memory, arithmetic speed."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayrl.learner.parallel import SOLO, Ranks

MEASURED = frozenset({"learner/peak_memory_mb", "learner/tflops_per_second", "learner/mfu"})
"""Metrics that depend on the machine and the moment, not on the seed."""

_SAMPLE = 65_536

_PEAK_TFLOPS = {
    # Dense peaks of the vendors' data sheets, without sparsity: device name, (bf16, fp32).
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "B200": (2250.0, 75.0),
}


class StepMeter:
    """Measures one step of the learner, from construction to :meth:`metrics`."""

    def __init__(
        self, device: str, dtype: torch.dtype, trained: Mapping[str, Tensor], ranks: Ranks = SOLO
    ) -> None:
        self._device, self._dtype, self._ranks = device, dtype, ranks
        self._size = UpdateSize(trained, ranks)
        self._started = time.perf_counter()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def metrics(self, flops: float) -> dict[str, float]:
        """Update size, peak memory and speed; ``flops`` are this rank's useful operations (see
        ``flops.py``), utilisation is against the dense peak of all ranks' devices where that is
        known.  Memory is this rank's."""
        everyone = self._ranks.total_metrics({"flops": (flops, 1.0)})["flops"]
        speed = everyone[0] / (time.perf_counter() - self._started) / 1e12
        measured = {
            "learner/update_ratio": self._size.ratio(),
            "learner/peak_memory_mb": peak_memory_mb(self._device),
            "learner/tflops_per_second": speed,
        }
        peak = device_peak_tflops(self._device, self._dtype)
        return measured if peak is None else {**measured, "learner/mfu": speed / peak / everyone[1]}


class UpdateSize:
    """The norm of what an optimizer step changed, over the norm of the weights.

    Exact for tensors of up to 65,536 elements; of a larger one that many, evenly spaced, stand
    for all, so that no second copy of the weights is held.
    """

    def __init__(self, named: Mapping[str, Tensor], ranks: Ranks = SOLO) -> None:
        self._named = named
        self._ranks = ranks
        self._before = {name: _sample(tensor).clone() for name, tensor in named.items()}

    def ratio(self) -> float:
        """Of the weights as they are now against those at construction."""
        moved = size = 0.0
        # What is empty: nothing of that tensor is on this rank.
        before = {name: sample for name, sample in self._before.items() if sample.numel()}
        if before:
            changes = [_sample(self._named[name]) - sample for name, sample in before.items()]
            counts = [_own(self._named[n]).numel() / s.numel() for n, s in before.items()]
            scales = torch.tensor(counts, dtype=torch.float64)
            moved = float(scales @ _squares(changes))
            size = float(scales @ _squares(list(before.values())))
        if self._ranks.sharded:
            moved, size = self._ranks.total_metrics({"": (moved, size)})[""]
        return math.sqrt(moved / size) if size else 0.0


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The squared norm of each tensor, in float64 on the CPU, read off the device once."""
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in tensors]
    return torch.stack(norms).cpu().double().square()


def _own(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    tensor = tensor.detach()
    own: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced elements; the spacing shares no factor with the row length, so that they come
    from every column."""
    tensor = _own(tensor)
    flat = tensor.reshape(-1)
    spacing = max(1, flat.numel() // _SAMPLE)
    while spacing > 1 and math.gcd(spacing, tensor.shape[-1]) > 1:
        spacing += 1
    return flat[::spacing]


def peak_memory_mb(device: str) -> float:
    """MiB that tensors took at most since the last reset (CUDA), or the process ever (CPU)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def device_peak_tflops(device: str, dtype: torch.dtype) -> float | None:
    """The device's dense peak for a type, where it is known."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    for known, (bf16, fp32) in _PEAK_TFLOPS.items():
        if re.search(rf"\b{known}\b", name):
            return bf16 if dtype == torch.bfloat16 else fp32
    return None
