"""What an objective sees of a step: groups of captions, their log-probs and rewards, as tensors.

Axes: P prompts (images), G captions of a prompt, T tokens, K reward terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OPTIONAL_FIELDS = {
    "ref_logprobs": "[P,G,T] log-probs under the frozen reference model",
    "greedy_rewards": "[P] reward of the arg-max caption",
    "reference_rewards": "[P,N] rewards of the stage-1 model's captions, or of the references",
    "values": "[P,G,T] a critic's values before each token, at the start of the step",
    "token_credit": "[P,G,T] a judge's credit for single tokens: 1 on those of a wrong span",
    "guide_logprobs": "[P,G,T] log-probs under a preference-tuned copy of the model",
    "forced": "[P,G,T] bool, tokens that were given as a hint and not sampled",
    "judge_ok": "[P,G] bool, whether the caption satisfies all constraints",
    "reward_versions": "[P,G] version of the reward model that scored the caption",
    "similarity": "[P,G,G] CIDEr / 10 between the captions of a group, 0..1",
    "prefix_values": "[P,G,T+1] value of each prefix: the reward of its whole words",
    "collision": "[P,G,T] sum over the vocabulary of squared probabilities",
    "auxiliary_logprobs": "[P,G,T,K] log-probs under one policy for each auxiliary reward",
    "augmented_ref_logprobs": "[P,G,T] reference log-probs of the captions after a changed image",
    "earlier": "[P,G] bool, captions that an earlier checkpoint sampled",
    "caption_features": "[P,G,D] the reference model's hidden states, a mean for each caption",
}
"""Fields of a batch that only some objectives need."""

GRAPH_FIELDS = {
    "entropy": "[P,G,T] entropy of the policy's next-token distribution",
    "policy_values": "[P,G,T] the critic's values under the current weights",
    "augmented_logprobs": "[P,G,T] policy log-probs of the captions after a changed image",
    "head_logprobs": "[P,G,T,K] policy log-probs, one output head for each reward term",
    "anchor_logprobs": "[P,R,L] policy log-probs of reference captions, 0 on padding",
    "anchor_mask": "[P,R,L] bool, the tokens of the reference captions",
}
"""Tensors that come from the model's current weights, with gradient; arguments of the loss."""


_FLOATS = ("rollout_logprobs", "old_logprobs", "rewards")
_BOOLS = ("mask", "valid", "truncated", "forced", "judge_ok", "earlier")
_DTYPES = {**dict.fromkeys(_FLOATS, "torch.float"), **dict.fromkeys(_BOOLS, "torch.bool")}
"""By field, how the name of its dtype begins."""

_SHOWN = 3


def listed(image_ids: Sequence[str]) -> str:
    """``prompts a, b, c, and 4 more``."""
    more = len(image_ids) - _SHOWN
    shown = ", ".join(image_ids[:_SHOWN])
    return f"prompts {shown}, and {more} more" if more > 0 else f"prompts {shown}"


@dataclass(frozen=True, eq=False)
class GroupBatch:
    """P groups of G captions.

    image_ids: P names, for messages and for what an objective remembers of an image
    token_ids: [P,G,T] int
    mask: [P,G,T] bool, the tokens that are there
    rollout_logprobs, old_logprobs: [P,G,T] float, of the engine that sampled and of the policy at
        the start of the step; 0 on padding
    terms: by name, [P,G] float
    rewards: [P,G] float, the weighted sum of ``terms``
    valid: [P,G] bool, False where a group has fewer captions
    truncated: [P,G] bool, captions that ran into the length limit
    reward_weights: of ``terms`` by name, 1 where it has none

    The other fields are None unless :attr:`Objective.needs` names them; ``OPTIONAL_FIELDS`` says
    what they hold.

    Raises ValueError on a field of another shape or dtype.
    """

    image_ids: tuple[str, ...]
    token_ids: Tensor
    mask: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor
    terms: Mapping[str, Tensor]
    rewards: Tensor
    valid: Tensor
    truncated: Tensor
    ref_logprobs: Tensor | None = None
    greedy_rewards: Tensor | None = None
    reference_rewards: Tensor | None = None
    values: Tensor | None = None
    token_credit: Tensor | None = None
    guide_logprobs: Tensor | None = None
    forced: Tensor | None = None
    judge_ok: Tensor | None = None
    reward_versions: Tensor | None = None
    similarity: Tensor | None = None
    prefix_values: Tensor | None = None
    collision: Tensor | None = None
    auxiliary_logprobs: Tensor | None = None
    augmented_ref_logprobs: Tensor | None = None
    earlier: Tensor | None = None
    caption_features: Tensor | None = None
    reward_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        p, g, t = self.mask.shape
        shapes = {
            "token_ids": (p, g, t),
            "rollout_logprobs": (p, g, t),
            "old_logprobs": (p, g, t),
            "rewards": (p, g),
            "valid": (p, g),
            "truncated": (p, g),
        }
        for name, want in shapes.items():
            got = tuple(getattr(self, name).shape)
            if got != want:
                raise ValueError(f"group batch: {name} of shape {got}, want {want}")
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if value is not None and not str(value.dtype).startswith(dtype):
                raise ValueError(
                    f"group batch: {name} of dtype {value.dtype}, want a tensor of {dtype}"
                )
        for name in OPTIONAL_FIELDS:
            value = getattr(self, name)
            if value is not None and value.shape[0] != p:
                raise ValueError(f"group batch: {name} of {value.shape[0]} prompts, want {p}")
        if len(self.image_ids) != p:
            raise ValueError(f"group batch: {len(self.image_ids)} image_ids, want {p}")

    def with_old_logprobs(self, old_logprobs: Tensor) -> GroupBatch:
        """The same with these log-probs [P,G,T] for the start of the step.  Engine and learner
        cannot disagree about a token that was forced: its rollout log-prob becomes the old one."""
        rollout = self.rollout_logprobs
        if self.forced is not None:
            rollout = old_logprobs.where(self.forced, rollout)
        return replace(self, old_logprobs=old_logprobs, rollout_logprobs=rollout)

    def select(self, prompt_indices: Sequence[int]) -> GroupBatch:
        """The groups of these prompts, in this order."""
        rows = list(prompt_indices)
        changes: dict[str, Any] = {
            "image_ids": tuple(self.image_ids[i] for i in rows),
            "terms": {name: value[rows] for name, value in self.terms.items()},
            "reward_weights": self.reward_weights,
        }
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.name not in changes and value is not None:
                changes[spec.name] = value[rows]
        return replace(self, **changes)
