"""What controllers decide about the weights and the learning rate, carried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rayrl.learner.parallel import SOLO, Ranks, like


class Decisions:
    """Carries out the decisions of ``Objective.control`` that outlive an update.

    scale_lr: from the next update on, the scheduled rate times this, until another decision
    extrapolate: at the end of the step, w + a (w - v), where w are the weights that the step
        trained and v those that the step before it trained, both before any extrapolation
        (Nesterov's form of accelerated preference optimization, 2410.06293)

    named: the parameters that train; v is only kept where ``extrapolates``, one copy of them
    """

    def __init__(self, named: Mapping[str, torch.nn.Parameter], *, extrapolates: bool) -> None:
        self._named = named
        self.lr_scale = 1.0
        self._factor = 0.0
        self._before = _copies(named) if extrapolates else {}

    def take(self, decisions: Mapping[str, Any]) -> bool:
        """Note the decisions after an update; returns whether the step goes on.

        Raises ValueError on a learning rate that is not positive."""
        scale = float(decisions.get("scale_lr", self.lr_scale))
        if not 0 < scale < float("inf"):
            raise ValueError(f"a controller scales the learning rate by {scale}, want a positive")
        self.lr_scale = scale
        self._factor = float(decisions.get("extrapolate", self._factor))
        return not decisions.get("stop_epoch", False)

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the weights on, if so decided during the step."""
        factor, self._factor = self._factor, 0.0
        if not self._before:
            return
        trained = _copies(self._named)
        if factor:
            for name, parameter in self._named.items():
                parameter.add_(trained[name] - self._before[name], alpha=factor)
        self._before = trained

    def arrays(self, ranks: Ranks = SOLO) -> dict[str, np.ndarray]:
        """The state between steps, to be checkpointed; whole on rank 0."""
        before = {
            f"decisions/before/{name}": np.array(ranks.gathered(value).float().numpy())
            for name, value in self._before.items()
        }
        return {"decisions/lr_scale": np.array(self.lr_scale), **before}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of :meth:`arrays`; what is not there starts anew at the weights as they are."""
        self.lr_scale = float(arrays.get("decisions/lr_scale", 1.0))
        for name in self._before:
            stored = arrays.get(f"decisions/before/{name}")
            parameter = self._named[name].detach()
            self._before[name] = (
                parameter.clone()
                if stored is None
                else like(torch.from_numpy(np.array(stored)), parameter)
            )


def _copies(named: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}
