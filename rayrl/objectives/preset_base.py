"""A preset: a plan with where it comes from; and the plans that many presets start from."""

from __future__ import annotations

from dataclasses import dataclass

from rayrl.objectives.plan import Phases, Plan, part


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published objective as a plan.

    title and source: the method's name and the paper's arXiv number, or "" where unknown
    limit: what it becomes in a limiting case, which a test can check
    basis: what the formula rests on: `code` of the authors or a framework, the paper's `text`,
        `docs` of a framework, the form that is commonly `recalled`, or the `abstract` alone
    note: what differs from the paper because captions have continuous rewards, and the like
    recommended: whether it is one to start with
    """

    title: str
    source: str
    plan: Plan | Phases
    limit: str
    basis: str
    note: str = ""
    recommended: bool = False


MAX_TOKENS = 24
"""The default of sampling.max_tokens, which takes its place in a run: rayrl.objectives.build."""

TRUNCATED_IS = part("token_truncated", is_cap=2.0)

CLIPPED = Plan(
    advantage=(part("group_normalize", eps=1e-4, ddof=1),),
    ratio=part("token"),
    bounds=part("fixed", clip_low=0.2, clip_high=0.2),
    surrogate=part("min_clip"),
    mismatch=TRUNCATED_IS,
    reducer=part("sequence_mean_token_mean"),
)
"""GRPO without a KL term."""

REINFORCE = Plan(
    advantage=(part("group_center"),),
    surrogate=part("reinforce"),
    mismatch=TRUNCATED_IS,
    reducer=part("token_mean"),
)
"""The policy gradient with the group's mean as its baseline."""

PREFERENCE = Plan(
    pairs=part("best_worst", min_gap=0.0),
    score=part("over_reference"),
    margin=part("difference", beta=0.1),
    link=part("logistic"),
    surrogate=part("pair_mean"),
)
"""DPO on the best and the worst caption of a fresh group."""
