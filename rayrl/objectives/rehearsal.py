"""An objective on made-up groups, so that what cannot work is said before a run and not within."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.objective import Objective
from rayrl.objectives.terms import NO_WEIGHTS, counted

_IMAGES, _TOKENS, _OTHERS = 3, 4, 2


def rehearse(
    objective: Objective,
    terms: Sequence[str],
    group_size: int,
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
) -> None:
    """Take a step, without a model, on groups of ``group_size`` captions with these reward terms.

    Raises ValueError, naming the objective, for what only shows there: a reward term that a part
    names and the run does not have, groups of one caption where captions are compared, advantages
    of tokens in front of a loss of captions.
    """
    for phase in objective.phases():
        batch = _groups(terms, group_size, reward_weights)
        try:
            state, prepared = phase.prepare(phase.initial_state(), batch)
            policy = _logprobs(batch.mask)
            graph: dict[str, Any] = _graph(batch, policy)
            out = phase.loss(prepared, policy, prepared.normalizer(), **graph)
            pairs = {name: (float(s), float(w)) for name, (s, w) in out.metrics.items()}
            phase.control(state, {name: s / w for name, (s, w) in pairs.items() if w})
        except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"objective {phase.name}, tried on groups of {group_size} with the reward terms "
                f"{', '.join(terms)}: {error}"
            ) from error


def _groups(
    terms: Sequence[str], group_size: int, reward_weights: Mapping[str, float]
) -> GroupBatch:
    """Groups with every field that an objective may need; all numbers lie within 0 and 1."""
    p, g, t = _IMAGES, group_size, _TOKENS
    draw = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    lengths = torch.randint(2, t + 1, (p, g), generator=draw)
    mask = torch.arange(t) < lengths[..., None]
    logprobs = _logprobs(mask)
    values = {name: uniform(p, g) for name in terms}
    return GroupBatch(
        image_ids=tuple(f"image {i}" for i in range(p)),
        token_ids=torch.randint(0, 9, (p, g, t), generator=draw),
        mask=mask,
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        terms=values,
        rewards=torch.stack(list(values.values())).sum(0),
        valid=torch.ones(p, g, dtype=torch.bool),
        truncated=lengths == t,
        ref_logprobs=logprobs,
        greedy_rewards=uniform(p),
        reference_rewards=uniform(p, _OTHERS),
        values=uniform(p, g, t) * mask,
        token_credit=torch.zeros(p, g, t),
        guide_logprobs=logprobs,
        forced=torch.zeros(p, g, t, dtype=torch.bool),
        judge_ok=torch.ones(p, g, dtype=torch.bool),
        reward_versions=torch.zeros(p, g, dtype=torch.long),
        similarity=torch.eye(g).expand(p, g, g),
        prefix_values=uniform(p, g, t + 1),
        phrases=torch.zeros(p, g, t, dtype=torch.long),
        collision=uniform(p, g, t) * mask,
        auxiliary_logprobs=logprobs[..., None].expand(p, g, t, _OTHERS),
        augmented_ref_logprobs=logprobs,
        earlier=torch.zeros(p, g, dtype=torch.bool),
        caption_features=uniform(p, g, _OTHERS),
        reward_weights=reward_weights,
    )


def _logprobs(mask: Tensor) -> Tensor:
    return torch.where(mask, -1.0, 0.0)


def _graph(batch: GroupBatch, policy: Tensor) -> dict[str, Tensor]:
    """What a loss may need of the model's current weights."""
    heads = len(counted(batch.terms, batch.reward_weights))
    return {
        "entropy": batch.mask.float(),
        "policy_values": torch.zeros_like(policy),
        "augmented_logprobs": policy,
        "head_logprobs": policy[..., None].expand(*policy.shape, heads),
        "anchor_logprobs": policy,
        "anchor_mask": batch.mask,
    }
