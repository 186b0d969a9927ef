"""What a part may read: the names, what stands behind each, and the slots that have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rayrl.objectives.batch import GRAPH_FIELDS, OPTIONAL_FIELDS
from rayrl.objectives.plan import SLOTS

DERIVED: Mapping[str, str] = {
    "labels": "labels",
    "segments": "segments",
    "advantages": "advantage",
    "caption_advantages": "advantage",
    "pair_weights": "pairs",
    "active": "pairs",
    "log_ratio": "ratio",
    "ratio": "ratio",
    "low": "bounds",
    "high": "bounds",
    "scores": "score",
    "margins": "margin",
    "pair_losses": "link",
}
"""Names that a slot produces."""

SERVICES: Mapping[str, str] = {
    "terms": "the reward terms by name, those of reward.terms",
    "whole_minibatch": "statistics of one: micro-batches must be as large as minibatches",
    "extrapolate": "a learner that carries out the decision to extrapolate its weights",
    "old_logprobs": "the policy's log-probs before the first update of a step",
}
"""Needs that are no optional field of the batch."""


@dataclass(frozen=True)
class Input:
    """What a name stands for, with shape and dtype, and the slots whose parts may read it."""

    what: str
    slots: tuple[str, ...]


def _from(first: str, last: str) -> tuple[str, ...]:
    return SLOTS[SLOTS.index(first) : SLOTS.index(last) + 1]


BEFORE_LOSS = _from("select", "pairs")
"""Slots whose parts run once a step, over all of its groups, without a gradient."""
LOSS = _from("ratio", "reducer")
"""Slots whose parts see a micro-batch, with the policy's gradient."""
_GROUPS = (*BEFORE_LOSS, *LOSS)
_LOSS = _from("ratio", "regularizers")

_AFTER = {
    "labels": (*_from("segments", "pairs"), *_LOSS),
    "segments": (*_from("aggregate", "pairs"), *_LOSS),
    "advantages": (*_from("advantage", "pairs"), *_LOSS),
    "caption_advantages": _LOSS,
    "pair_weights": _LOSS,
    "active": LOSS,
    "log_ratio": _from("bounds", "regularizers"),
    "ratio": _from("bounds", "regularizers"),
    "low": _from("weights", "regularizers"),
    "high": _from("weights", "regularizers"),
    "scores": _from("margin", "regularizers"),
    "margins": _from("link", "regularizers"),
    "pair_losses": _from("surrogate", "regularizers"),
}
_MEANING = {
    "labels": "[P,G] float in 0..1, which captions count as good",
    "segments": "[P,G,T] int from 0 on, ids of the segments of a caption",
    "advantages": "[P,G,1] or [P,G,T] float; before the loss what the parts so far made",
    "caption_advantages": "[P,G] float, the advantages where they are one a caption",
    "pair_weights": "[P,G,G] float, how much 'i is better than j' counts",
    "active": "[P] float, 1 for groups that have a pair",
    "log_ratio": "[P,G,T] float, log of policy over old; 0 on padding",
    "ratio": "[P,G,T] float, its exponential, finite everywhere",
    "low": "a number or float broadcast to [P,G,T], the lower bound of the ratio",
    "high": "the same, the upper bound",
    "scores": "[P,G] float, of captions",
    "margins": "[P,G,G] float, of pairs",
    "pair_losses": "[P,G,G] float, of pairs",
}

INPUTS: Mapping[str, Input] = {
    "image_ids": Input("P strings", _GROUPS),
    "token_ids": Input("[P,G,T] int", _GROUPS),
    "mask": Input("[P,G,T] bool, the tokens that are there", _GROUPS),
    "lengths": Input("[P,G] int, tokens of a caption", _GROUPS),
    "truncated": Input("[P,G] bool, captions that ran into the length limit", _GROUPS),
    "valid": Input(
        "[P,G] bool, captions that count; up to `advantage`, those of `statistics_of`", _GROUPS
    ),
    "rollout_logprobs": Input("[P,G,T] float, of the engine that sampled", _GROUPS),
    "old_logprobs": Input(
        "[P,G,T] float, of the policy before the first update of the step", _GROUPS
    ),
    "rewards": Input(
        "[P,G] float, in the loss and from `advantage` on as `aggregate` made them", _GROUPS
    ),
    "raw_rewards": Input("[P,G] float, the weighted sums of the terms", _GROUPS),
    "terms": Input("by name [P,G] float, the reward terms", _GROUPS),
    "reward_weights": Input("by name a number, their weights; 1 where there is none", _GROUPS),
    "caption_weights": Input("[P,G] float, what `select` made so far; 0 drops", _GROUPS),
    "step": Input("int, the step from 0 on", BEFORE_LOSS),
    "generator": Input("torch.Generator on the CPU, the same in a resumed run", BEFORE_LOSS),
    "state": Input(
        "mapping, what the part returned the last time as `(result, state)`",
        (*BEFORE_LOSS, "control"),
    ),
    **{name: Input(_MEANING[name], slots) for name, slots in _AFTER.items()},
    "policy_logprobs": Input("[P,G,T] float, of the current weights, with gradient", _LOSS),
    "token_weights": Input("[P,G,T] float, what `mask` made; 0 on padding", LOSS),
    "normalizer": Input("`tokens`, `captions`, `groups` of the minibatch, weighted", LOSS),
    "total": Input(
        "function, sums a tensor over the ranks; the part needs the `whole_minibatch`", LOSS
    ),
    "losses": Input("[P,G,T] float, of tokens", ("reducer",)),
    "metrics": Input("by name a number, of the update", ("control",)),
    "parameters": Input("by name the plan's, as controllers have changed them", ("control",)),
    "extrapolate": Input("True, for a learner that can", ("control",)),
    "drawn": Input("`rayrl.planning.Drawn`, the step's sampling so far", ("rollout",)),
    "take": Input("function, `take(n)` gives n further prompts", ("rollout",)),
    "encode": Input("function, a text's token ids", ("rollout",)),
    **{name: Input(what, _GROUPS) for name, what in OPTIONAL_FIELDS.items()},
    **{name: Input(what, _LOSS) for name, what in GRAPH_FIELDS.items()},
}


def readable(slot: str) -> list[str]:
    """What parts of a slot may read, needs aside."""
    needs = {*OPTIONAL_FIELDS, *GRAPH_FIELDS}
    return [name for name, one in INPUTS.items() if slot in one.slots and name not in needs]
