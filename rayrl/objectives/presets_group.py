"""Objectives whose loss compares the captions of a group: regression, discrimination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayrl.objectives.plan import Plan, part
from rayrl.objectives.preset_base import MAX_TOKENS, Preset

DISCRIMINATIVE = Plan(
    labels=part("above_group_mean"),
    pairs=part("across_levels"),
    score=part("mean_logprob"),
    surrogate=part("contrastive", contrast_temperature=10.0),
    regularizers=(part("trust_region", kl_limit=1e-4, kl_penalty=1e3),),
)

GROUP: Mapping[str, Preset] = {
    "kimi_k15": Preset(
        title="Kimi k1.5: linear form of the regression on log-ratios",
        source="2501.12599",
        plan=Plan(advantage=(part("group_center"),), surrogate=part("kimi", score_factor=0.1)),
        limit="policy = old: REINFORCE with the group's mean",
        basis="code",
    ),
    "pmd_mean": Preset(
        title="Policy mirror descent: regression on log-ratios",
        source="2501.12599",
        plan=Plan(
            advantage=(part("group_center"),),
            score=part("over_old"),
            surrogate=part("regression", score_factor=0.1),
        ),
        limit="policy = old: REINFORCE with the group's mean, times 2 score_factor",
        basis="code",
    ),
    "a_star_po": Preset(
        title="A*-PO: regression on the advantage over the reference's soft value",
        source="2505.20686",
        plan=Plan(
            advantage=(part("reference_value_baseline", value_temperature=0.5),),
            score=part("over_reference"),
            surrogate=part("regression", score_factor=1e-3),
        ),
        limit="policy = reference: REINFORCE with that baseline, times 2 score_factor",
        basis="code",
    ),
    "reg_grpo": Preset(
        title="Reg-GRPO: regression of standardised log-ratios on advantages (DeepVideo-R1)",
        source="2506.07464",
        plan=Plan(
            rollout=(part("change_by_difficulty", noise_rate=0.1, hint_rate=0.25),),
            advantage=(part("group_normalize", eps=1e-4, ddof=0),),
            score=part("sampled_over_old"),
            surrogate=part("standardized_regression", spread_floor=0.1),
        ),
        limit="without the spread: pmd_mean",
        basis="text",
        note="spread_floor makes the first gradient of a step finite; rollout= leaves out the "
        "changed images",
    ),
    "disco_log_likelihood": Preset(
        title="DisCO, scores are mean log-probs",
        source="2505.12366",
        plan=DISCRIMINATIVE,
        limit="contrast_temperature to infinity: disco_b",
        basis="code",
        note="good is what is above the group's mean; labels=above sets a threshold",
    ),
    "disco_ratio": Preset(
        title="DisCO, scores are mean ratios",
        source="2505.12366",
        plan=replace(
            DISCRIMINATIVE,
            ratio=part("token"),
            score=part("mean_ratio"),
            surrogate=part("contrastive", contrast_temperature=1.0),
        ),
        limit="contrast_temperature to infinity: mean difference of ratios",
        basis="code",
    ),
    "disco_b": Preset(
        title="DisCO-b: mean difference of scores",
        source="2505.12366",
        plan=replace(
            DISCRIMINATIVE,
            margin=part("difference", beta=1.0),
            link=part("linear"),
            surrogate=part("pair_mean"),
        ),
        limit="disco_log_likelihood at contrast_temperature infinity",
        basis="code",
    ),
    "drpo_decoupled": Preset(
        title="DRPO: brevity decided among the good captions alone",
        source="2510.04474",
        plan=replace(
            DISCRIMINATIVE,
            pairs=part("shorter_good", max_tokens=MAX_TOKENS, brevity_temperature=0.1),
        ),
        limit="brevity_temperature to infinity: disco_log_likelihood",
        basis="code",
        note="max_tokens follows sampling.max_tokens",
    ),
    "pacs": Preset(
        title="PACS: the reward as the label of a supervised loss",
        source="2509.02522",
        plan=Plan(
            labels=part("between_extremes"),
            score=part("over_old"),
            surrogate=part("leave_one_out_bce", beta=1.0),
        ),
        limit="policy = old: loss log 2, the gradient of REINFORCE with centred labels",
        basis="code",
        note="soft labels between the group's worst and best reward",
    ),
    "brain_posterior": Preset(
        title="BRAIn: the group's distribution matched to its posterior",
        source="2402.02479",
        plan=Plan(surrogate=part("posterior_matching", posterior_temperature=1.0)),
        limit="policy = old = reference: the advantage is softmax(r / tau) - 1/G",
        basis="recalled",
    ),
}
