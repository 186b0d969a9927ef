"""The learner on a GPU that it shares with an engine: what an update alone needs comes and goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from rayrl.learner.masters import Masters

log = logging.getLogger(__name__)


class TakesTurns:
    """While entered, the optimizer's state and the float32 masters are beside the parameters that
    they belong to.  Outside they are in host memory, there are no gradients, and what the allocator
    kept goes back to the GPU.  The model itself stays: engines are sent its weights, and it scores
    the canary."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Masters) -> None:
        self._optimizer, self._masters = optimizer, masters
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = parameters[0].device
        self._places: dict[Any, torch.Tensor] = {}
        self._leave()

    def __enter__(self) -> None:
        for master in self._masters.copies:
            master.data = master.data.to(self._device, non_blocking=True)
        for parameter, name, value in self._states():
            self._optimizer.state[parameter][name] = value.to(self._device, non_blocking=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._leave()

    def _leave(self) -> None:
        for number, master in enumerate(self._masters.copies):
            master.data = self._in_host_memory(number, master.data)
        for parameter, name, value in self._states():
            there = self._in_host_memory((parameter, name), value)
            self._optimizer.state[parameter][name] = there
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def _states(self) -> Iterator[tuple[torch.Tensor, str, torch.Tensor]]:
        """The optimizer's tensors, but not its counts of steps, which are single numbers."""
        for parameter, state in self._optimizer.state.items():
            for name, value in list(state.items()):
                if isinstance(value, torch.Tensor) and value.dim():
                    yield parameter, name, value

    def _in_host_memory(self, key: Any, value: torch.Tensor) -> torch.Tensor:
        """The same values in a place that stays: pinned memory, to and from which a GPU copies
        several times as fast, is slow to get."""
        if value.device.type == "cpu":
            return value
        if key not in self._places:
            self._places[key] = _pinned_like(value)
        return self._places[key].copy_(value, non_blocking=True)


def _forget_error(device: torch.device) -> None:
    """Have CUDA tell of the last error, and with that forget it: launching any kernel asks."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)


def _pinned_like(value: torch.Tensor) -> torch.Tensor:
    """Memory of the host for the values of a tensor: pinned where the system allows that."""
    place = torch.empty_like(value, device="cpu")
    # PyTorch's own pinned memory comes in powers of two, nearly twice as much.
    cudart = torch.cuda.cudart()
    if place.nbytes and int(cudart.cudaHostRegister(place.data_ptr(), place.nbytes, 0)):
        # CUDA keeps an error until somebody asks, who would be the next kernel.
        _forget_error(value.device)
        log.warning(
            "%d bytes of host memory cannot be pinned; copies to and from the GPU are slower",
            place.nbytes,
        )
    return place
