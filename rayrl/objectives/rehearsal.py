"""An objective on made-up groups, so that what cannot work is said before a run and not within."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rayrl.checkpoint import join_state, split_state
from rayrl.objectives.batch import OPTIONAL_FIELDS, GroupBatch
from rayrl.objectives.inject import TROUBLE
from rayrl.objectives.objective import LossOutput, Objective, State
from rayrl.objectives.terms import NO_WEIGHTS, counted

_IMAGES, _TOKENS, _OTHERS = 3, 4, 2


def rehearse(
    objective: Objective,
    terms: Sequence[str],
    group_size: int,
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
) -> None:
    """Take a step, and one more from a checkpoint of it, without a model, on groups of
    ``group_size`` captions with these reward terms.

    Raises ValueError, naming the objective and the part, for what only shows there: a reward term
    that a part names and the run does not have, groups of one caption where captions are compared,
    advantages of tokens in front of a loss of captions, a result that is not what its slot wants, a
    state that no checkpoint can hold, a loss or a gradient that is not finite, a decision that
    there is not, a metric that a controller reads and nothing reports.
    """
    for phase in objective.phases():
        when = ""
        try:
            batch = _groups(terms, group_size, reward_weights, objective.needs)
            state, out, _ = _trial(phase, phase.initial_state(), batch, objective.needs)
            pairs = {name: (float(s), float(w)) for name, (s, w) in out.metrics.items()}
            state, _ = phase.control(state, {name: s / w for name, (s, w) in pairs.items() if w})
            state = _resumed(state)
            when = "in the step after a checkpoint, from which tensors come back as arrays: "
            _trial(phase, state, batch, objective.needs)
        except TROUBLE as error:
            raise ValueError(
                f"objective {phase.name}, tried on groups of {group_size} with the reward terms "
                f"{', '.join(terms)}: {when}{_told(error)}"
            ) from error


def learns_from_one(
    objective: Objective,
    terms: Sequence[str],
    reward_weights: Mapping[str, float] = NO_WEIGHTS,
) -> bool:
    """Whether groups of one caption teach an objective something, in each of its phases: whether
    its gradient in the caption's log-probs depends on the reward.  It is asked in the second step
    that sees the images, for some compare a caption with those of before."""
    batch = _groups(terms, 1, reward_weights, objective.needs)
    others = {name: 1 - values for name, values in batch.terms.items()}
    other = replace(batch, terms=others, rewards=torch.stack(list(others.values())).sum(0))
    for phase in objective.phases():
        try:
            state, *_ = _trial(phase, phase.initial_state(), batch, objective.needs)
            one, two = (_trial(phase, state, some, objective.needs)[2] for some in (batch, other))
        except TROUBLE:
            return False
        if float((one - two).abs().max()) <= max(
            _ROUNDING, _ROUNDING_SHARE * float(one.abs().max())
        ):
            return False
    return True


_ROUNDING, _ROUNDING_SHARE = 1e-6, 1e-3
"""A change of the gradient, and as a share of it, that may come from rounding alone."""


def _resumed(state: State) -> State:
    """The state after a checkpoint; ValueError where it cannot be in one."""
    arrays, values = split_state(state, "")
    return join_state(json.loads(json.dumps(values)), arrays, "")


def _told(error: BaseException) -> str:
    """The error with the part that raised it; its kind too, where its text alone says little."""
    part = list(getattr(error, "__notes__", ()))[:1]
    kind = [] if isinstance(error, ValueError) else [type(error).__name__]
    return ": ".join([*part, *kind, str(error)])


def _trial(
    phase: Objective, state: State, batch: GroupBatch, needs: Collection[str]
) -> tuple[State, LossOutput, Tensor]:
    """One update: the state after it, its loss, and the gradient in the log-probs [P,G,T].

    Raises ValueError where the loss has no gradient, or one of the two is not finite."""
    state, prepared = phase.prepare(state, batch)
    policy = _logprobs(batch.mask).requires_grad_()
    graph: dict[str, Any] = {k: v for k, v in _graph(batch, policy).items() if k in needs}
    out = phase.loss(prepared, policy, prepared.normalizer(), **graph)
    for name, (value, _) in out.metrics.items():
        if name.startswith(_LOSS) and not torch.isfinite(value):
            raise ValueError(
                f"the loss {name.removeprefix(_LOSS)} is {float(value)}, want a finite one; "
                "a parameter may be out of its range, as a 0 that something is divided by"
            )
    if not out.loss.requires_grad:
        raise ValueError("the loss does not depend on the policy: it has no gradient")
    leaves = {
        "the policy": policy,
        **{k: v for k, v in graph.items() if v.is_leaf and v.requires_grad},
    }
    gradients = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            raise ValueError(
                f"the loss is finite, its gradient in {name} is not, and no update could be taken; "
                "a parameter may be out of its range, as a 0 that something is divided by"
            )
    own = gradients[0]
    return state, out, torch.zeros_like(policy) if own is None else own


_LOSS = "objective/loss_"


def _groups(
    terms: Sequence[str],
    group_size: int,
    reward_weights: Mapping[str, float],
    needs: Collection[str],
) -> GroupBatch:
    """Groups with the fields that a run brings for these ``needs``; all numbers lie within 0 and 1.
    The caption of an earlier checkpoint is one more than the ``group_size``."""
    p, g, t = _IMAGES, group_size + ("earlier" in needs), _TOKENS
    draw = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw)

    lengths = torch.randint(2, t + 1, (p, g), generator=draw)
    mask = torch.arange(t) < lengths[..., None]
    logprobs = _logprobs(mask)
    values = {name: uniform(p, g) for name in terms}
    groups = GroupBatch(
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
        collision=uniform(p, g, t) * mask,
        auxiliary_logprobs=logprobs[..., None].expand(p, g, t, _OTHERS),
        augmented_ref_logprobs=logprobs,
        earlier=(torch.arange(g) == group_size).expand(p, g),
        caption_features=uniform(p, g, _OTHERS),
        reward_weights=reward_weights,
    )
    # Which tokens are forced is always known.
    others: dict[str, Any] = dict.fromkeys(OPTIONAL_FIELDS.keys() - {"forced", *needs})
    return replace(groups, **others)


def _logprobs(mask: Tensor) -> Tensor:
    """The same for every model, so that all ratios are 1, but no two alike: some parts look at how
    they vary over a minibatch."""
    values = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1))
    return torch.where(mask, -0.5 - values, 0.0)


def _graph(batch: GroupBatch, policy: Tensor) -> dict[str, Tensor]:
    """What a loss may need of the model's current weights."""
    heads = len(counted(batch.terms, batch.reward_weights))
    return {
        "entropy": batch.mask.float().requires_grad_(),
        "policy_values": torch.zeros_like(policy, requires_grad=True),
        "augmented_logprobs": policy,
        "head_logprobs": policy[..., None].expand(*policy.shape, heads),
        "anchor_logprobs": policy,
        "anchor_mask": batch.mask,
    }
