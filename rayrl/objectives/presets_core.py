"""The general objectives: GRPO, SCST and their nearest relatives."""

from __future__ import annotations

from collections.abc import Mapping

from rayrl.objectives.plan import Plan, part
from rayrl.objectives.preset import Preset

TOKEN_IS = part("token_truncated", is_cap=2.0)

CORE: Mapping[str, Preset] = {
    "grpo": Preset(
        title="GRPO for image captioning",
        source="2503.01333",
        plan=Plan(
            advantage=(part("group_normalize", eps=1e-5, ddof=0),),
            ratio=part("token"),
            bounds=part("fixed", clip_low=0.2, clip_high=0.2),
            surrogate=part("min_clip"),
            mismatch=TOKEN_IS,
            regularizers=(part("kl_k3", kl_coef=0.04),),
            reducer=part("token_mean"),
        ),
        limit="one update and kl_coef 0: nsc times (G-1)/G, divided by the group's spread",
        basis="code",
        recommended=True,
    ),
    "scst": Preset(
        title="Self-critical sequence training",
        source="1612.00563",
        plan=Plan(
            advantage=(part("greedy_baseline"),),
            surrogate=part("reinforce"),
            mismatch=TOKEN_IS,
            reducer=part("token_mean"),
        ),
        limit="the group's mean in place of the greedy reward: the advantage of dr_grpo",
        basis="code",
        recommended=True,
    ),
    "nsc": Preset(
        title="A better variant of self-critical sequence training (leave-one-out baseline)",
        source="2003.09971",
        plan=Plan(
            advantage=(part("leave_one_out"),),
            surrogate=part("reinforce"),
            mismatch=TOKEN_IS,
            reducer=part("token_mean"),
        ),
        limit="the advantage of dr_grpo times G/(G-1)",
        basis="code",
        recommended=True,
    ),
}
