"""What a computation costs (FLOPs, peak memory), what the device gives at best, and how far a
gradient is from another."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Cost:
    """``flops`` count matrix products and convolutions, attention as if its mask were dense;
    ``peak_bytes`` is the most in tensors made inside."""

    flops: int = 0
    peak_bytes: int = 0


@contextmanager
def counted(device: str) -> Iterator[Cost]:
    """The cost of what runs inside; filled in at the end."""
    cost = Cost()
    memory = _CudaMemory() if device == "cuda" else _TensorMemory()
    with FlopCounterMode(display=False, custom_mapping=_cpu_attention()) as counter, memory:
        yield cost
    cost.flops = counter.get_total_flops()
    cost.peak_bytes = memory.peak


def _cpu_attention() -> dict[Any, Any]:
    """torch counts attention on CUDA; on CPU its kernel has another name."""
    aten: Any = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }


class _CudaMemory:
    """Peak of the CUDA allocator beyond what was in use before."""

    peak = 0

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - self._before


class _TensorMemory(TorchDispatchMode):
    """Most bytes at once in tensors made inside, counted by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for storage in _storages((args, kwargs)):  # what exists already is not counted
            self._watch(storage, 0)
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._watch(storage, storage.nbytes())
        return out

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self._live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class LargeProduct:
    """A large matrix product, which takes as good as all that a device gives in a type."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        n = 8192 if device == "cuda" else 1536
        self.flops = 2 * n**3
        self._factors = [torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)]

    def __call__(self) -> None:
        torch.mm(*self._factors)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that ``work`` takes on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def distance(gradient: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """|gradient - reference| / |reference| over all parameters."""
    if gradient.keys() != reference.keys():
        raise ValueError(f"gradients of {sorted(gradient.keys() ^ reference.keys())[:3]} differ")
    difference = sum(float((gradient[n] - g).float().square().sum()) for n, g in reference.items())
    length = sum(float(g.float().square().sum()) for g in reference.values())
    return float((difference / length) ** 0.5)
