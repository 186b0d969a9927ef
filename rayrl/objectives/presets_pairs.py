"""Preference objectives on pairs of a fresh group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayrl.objectives.plan import Phases, Plan, part
from rayrl.objectives.preset_base import CLIPPED, PREFERENCE, Preset

K3 = part("kl_k3", kl_coef=0.04)

PAIRS: Mapping[str, Preset] = {
    "online_dpo": Preset(
        title="Online DPO, best against worst",
        source="2305.18290",
        plan=PREFERENCE,
        limit="equal log-probs: REINFORCE with advantages of +-beta/2",
        basis="code",
    ),
    "online_ipo": Preset(
        title="Online IPO (identity preference optimization)",
        source="2310.12036",
        plan=replace(
            PREFERENCE,
            score=part("mean_over_reference"),
            link=part("squared", beta=0.1),
        ),
        limit="the difference of scores settles at 1 / (2 beta)",
        basis="code",
    ),
    "chi_po": Preset(
        title="chi-PO: a chi-squared link to the reference",
        source="2407.13399",
        plan=replace(
            PREFERENCE,
            score=part("chi_squared"),
            margin=part("clipped_difference", beta=0.1, margin_cap=20.0),
        ),
        limit="near the reference: online_dpo with 2 beta",
        basis="recalled",
        note="margin_cap: twice the range of the rewards",
    ),
    "simpo": Preset(
        title="SimPO: mean log-probs and a target margin, no reference",
        source="2405.14734",
        plan=replace(
            PREFERENCE,
            score=part("mean_logprob"),
            margin=part("target_margin", beta=2.5, target=1.375),
        ),
        limit="target 0 and equal lengths: online_dpo without a reference",
        basis="docs",
    ),
    "rpo_regularized": Preset(
        title="RPO: DPO with the log-prob of the better caption",
        source="2405.16436",
        plan=replace(
            PREFERENCE,
            margin=part("difference", beta=0.01),
            regularizers=(part("nll_better", nll_coef=0.005),),
        ),
        limit="nll_coef 0: online_dpo",
        basis="docs",
    ),
    "trpa_levels": Preset(
        title="TRPA: preferences across levels, the top one stronger",
        source="2504.04524",
        plan=replace(
            PREFERENCE,
            labels=part("levels", level_width=0.5),
            pairs=part("across_levels"),
            score=part("mean_over_reference"),
            margin=part("favour_top", beta=1.0, top_factor=2.5),
        ),
        limit="two levels and top_factor 1: online_dpo on means",
        basis="code",
        note="levels are steps of the reward; a group of one level is skipped",
    ),
    "codpo": Preset(
        title="CODPO: the best satisfying caption against the worst violating one",
        source="2409.20370",
        plan=replace(
            PREFERENCE,
            pairs=part("satisfying_violating"),
            regularizers=(part("nll_better", nll_coef=1.0),),
        ),
        limit="no judges and nll_coef 0: online_dpo",
        basis="text",
    ),
    "p3o_pairwise": Preset(
        title="P3O: pairwise policy gradient",
        source="2310.00212",
        plan=Plan(
            aggregate=(part("kl_penalty", reward_kl_coef=0.02),),
            pairs=part("each_once"),
            surrogate=part("pairwise_policy_gradient", pair_clip=0.2),
        ),
        limit="policy = old: REINFORCE with the group's mean, times G/2",
        basis="recalled",
    ),
    "prdp_reward_difference": Preset(
        title="PRDP: differences of log-ratios predict differences of rewards",
        source="2402.08714",
        plan=Plan(
            pairs=part("half_square"),
            surrogate=part("reward_difference", beta=0.1, token_clip=0.2),
        ),
        limit="no clip: the variance of beta D - r in the group",
        basis="text",
        note="times beta^2; beta and token_clip are not in the text that was read",
    ),
    "mpo_maximum_preference": Preset(
        title="MPO: maximum preference optimization",
        source="2312.16430",
        plan=replace(
            PREFERENCE,
            score=part("logprob"),
            link=part("sigmoid"),
            regularizers=(K3,),
        ),
        limit="small margins: half of online_dpo",
        basis="recalled",
    ),
    "modpo": Preset(
        title="MODPO: pairs by one term, a margin from the others",
        source="2310.03708",
        plan=replace(
            PREFERENCE,
            aggregate=(part("only_term", main_term="cider_d"),),
            margin=part("other_terms", beta=0.1, main_term="cider_d", main_weight=0.7),
        ),
        limit="main_weight 1: online_dpo",
        basis="code",
        note="the others share 1 - main_weight by their weights under reward.terms",
    ),
    "apo_momentum": Preset(
        title="Accelerated preference optimization: momentum between rounds",
        source="2410.06293",
        plan=replace(PREFERENCE, control=(part("momentum", momentum_factor=0.3),)),
        limit="momentum_factor 0: online_dpo",
        basis="abstract",
        note="the decision `extrapolate`, which the learner carries out; no published factor; the "
        "reference stays the stage-1 model, where the paper's moves along",
    ),
    "tgdpo": Preset(
        title="TGDPO: tokens weighted by a preference-tuned copy",
        source="2506.14574",
        plan=replace(PREFERENCE, score=None, margin=part("guided_tokens", beta=0.1, guidance=0.5)),
        limit="guidance 0: online_dpo",
        basis="code",
    ),
    "dpo_two_betas": Preset(
        title="3D-properties of DPO: the worse caption is pushed less",
        source="2406.07327",
        plan=replace(PREFERENCE, margin=part("two_betas", beta_better=0.1, beta_worse=0.05)),
        limit="equal betas: online_dpo",
        basis="recalled",
    ),
    "mah_dpo_heads": Preset(
        title="MAH-DPO: one output head for each reward term",
        source="2510.01167",
        plan=Plan(surrogate=part("heads", beta=0.1)),
        limit="one term: online_dpo",
        basis="abstract",
        note="terms of weight 0 have none",
    ),
    "pami_changed_image": Preset(
        title="PaMi-VDPO: the caption must depend on the image",
        source="2504.05810",
        plan=Plan(pairs=part("best_worst", min_gap=0.0), surrogate=part("changed_image", beta=0.1)),
        limit="an unchanged image: no gradient",
        basis="abstract",
    ),
    "seppo_earlier": Preset(
        title="SePPO: captions of an earlier checkpoint as the other side",
        source="2410.05255",
        plan=replace(
            PREFERENCE,
            pairs=part("best_against_earlier"),
            margin=part("signed_by_reward", beta=0.1),
        ),
        limit="an earlier caption that is worse: online_dpo on it",
        basis="abstract",
    ),
    "smpo_soft_label": Preset(
        title="Soft preference labels from the difference of rewards (SmPO)",
        source="2506.02698",
        plan=replace(PREFERENCE, link=part("soft_label", label_slope=2.0)),
        limit="label_slope to infinity: online_dpo",
        basis="abstract",
    ),
    "hanorec_hardness": Preset(
        title="HaNoRec: hard pairs count more",
        source="",
        plan=replace(PREFERENCE, link=part("focal", hardness=1.0)),
        limit="hardness 0: online_dpo",
        basis="abstract",
        note="the focal weight is a reading of the abstract",
    ),
    "veripo_schedule": Preset(
        title="VerIPO: GRPO and DPO take turns",
        source="2505.19000",
        plan=Phases((CLIPPED, PREFERENCE), (200, 50)),
        limit="only GRPO steps: GRPO",
        basis="abstract",
        note="steps have no published values; phase_steps, 200+50, want a run of more than 200",
    ),
}
