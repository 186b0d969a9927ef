"""What the reference model makes of captions, for a scorer that learns to tell them apart."""

from __future__ import annotations

from torch import Tensor

from rayrl.learner.policy import Policy
from rayrl.learner.providers import MicroBatch, Provider


class CaptionFeatures(Provider):
    """The reference model's last hidden states, averaged over a caption's tokens [P,G,D].  That
    model never changes, so features of different steps can be compared."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def at_start(self, part: MicroBatch) -> dict[str, Tensor]:
        with self._policy.as_reference() as model:
            states = part.forward(model, part.groups, part.prompts, with_states=True).states
        assert states is not None
        lengths = part.groups.mask.sum(-1, keepdim=True).clamp(min=1)
        return {"caption_features": states.spread(states.hidden.float()).sum(2) / lengths}
