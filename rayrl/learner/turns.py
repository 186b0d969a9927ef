"""The learner on a GPU that it shares with an engine: what an update alone needs comes and goes."""

from __future__ import annotations

from types import TracebackType

import torch

from rayrl.learner.masters import Masters


class TakesTurns:
    """While entered, the optimizer's state and the float32 masters are beside the parameters that
    they belong to.  Outside they are in host memory, there are no gradients, and what the allocator
    kept goes back to the GPU.  The model itself stays: engines are sent its weights, and it scores
    the canary."""

    def __init__(self, optimizer: torch.optim.Optimizer, masters: Masters) -> None:
        self._optimizer, self._masters = optimizer, masters
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = parameters[0].device
        self._move(torch.device("cpu"))

    def __enter__(self) -> None:
        self._move(self._device)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._move(torch.device("cpu"))
        torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        for master in self._masters.copies:
            master.data = master.data.to(device)
        for state in self._optimizer.state.values():
            for name, value in state.items():
                # The number of steps is a scalar that AdamW keeps in host memory.
                if isinstance(value, torch.Tensor) and value.dim():
                    state[name] = value.to(device)
