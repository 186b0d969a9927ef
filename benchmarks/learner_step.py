"""What follows the gradients of an update, as the learner does it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rayrl.learner.masters import Masters
from rayrl.learner.optimizer import clip_gradients, make_optimizer

# A rate of 0 costs the same as any other and leaves the weights where they are.  The learner's own
# configuration would want pydantic.
CONFIG: Any = SimpleNamespace(lr=0.0, weight_decay=0.01, betas=(0.9, 0.999))
GRAD_CLIP = 1.0


class Step:
    """AdamW on clipped gradients, for parameters of lower precision on float32 masters that are
    rounded into them afterwards; its moments are in memory from the start."""

    def __init__(self, model: Any) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = Masters(trained)
        self.optimizer = make_optimizer(self.masters.named, CONFIG)
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self.collect()
        self.take()

    def collect(self) -> None:
        """After every backward pass."""
        self.masters.collect()

    def take(self) -> None:
        """After all of them."""
        clip_gradients(self.masters.named.values(), GRAD_CLIP)
        self.optimizer.step()
        self.masters.publish()
        self.optimizer.zero_grad(set_to_none=True)
