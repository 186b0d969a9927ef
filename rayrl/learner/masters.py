"""Float32 masters of parameters that compute in bfloat16.

A bfloat16 number has eight bits of precision, so an update below a 256th of a weight rounds to
nothing.  The model computes in bfloat16; gradients add up, and the optimizer steps, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from rayrl.learner.parallel import SOLO, Ranks, like

_PREFIX = "master/"


class Masters:
    """What the optimizer steps: ``named`` holds a float32 copy of every parameter of lower
    precision, and float32 parameters themselves."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._computing = dict(parameters)
        self.named = {name: _master(p) for name, p in parameters.items()}
        self._copied = [n for n, p in parameters.items() if self.named[n] is not p]

    def collect(self) -> None:
        """Add a backward pass's gradients to the masters'; after every micro-batch, so that they
        add up in float32."""
        for name in self._copied:
            gradient, master = self._computing[name].grad, self.named[name]
            if gradient is not None:
                if master.grad is None:
                    master.grad = gradient.float()
                else:
                    master.grad.add_(gradient)
                self._computing[name].grad = None

    @property
    def copies(self) -> list[nn.Parameter]:
        """The masters that are not parameters of the model."""
        return [self.named[name] for name in self._copied]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters that compute."""
        for name in self._copied:
            self._computing[name].copy_(self.named[name])

    def arrays(self, ranks: Ranks = SOLO) -> dict[str, np.ndarray]:
        """The masters, to be checkpointed exactly; whole on rank 0.  Float32 parameters are in
        the model's own files."""
        return {
            _PREFIX + name: np.array(ranks.gathered(self.named[name]).numpy())
            for name in self._copied
        }

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`arrays`, after the model's own files were loaded; masters that are not
        there (of a run in float32) start from those.  A parameter that is float32 now takes the
        master that it had in bfloat16, to which the model's files are but close."""
        for name, parameter in self._computing.items():
            stored, master = arrays.get(_PREFIX + name), self.named[name]
            if stored is not None:
                master.copy_(like(torch.from_numpy(np.array(stored)), master))
            elif master is not parameter:
                master.copy_(parameter)
        self.publish()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())
