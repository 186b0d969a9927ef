"""Objectives that differ in what becomes of the rewards: several terms, shaping, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayrl.objectives.plan import part
from rayrl.objectives.preset_base import CLIPPED, REINFORCE, Preset

ABOVE_MEAN = part("above_group_mean")

REWARD: Mapping[str, Preset] = {
    "mo_grpo": Preset(
        title="Multi-objective GRPO: weighted sum of terms, then normalised",
        source="2503.21819",
        plan=replace(CLIPPED, aggregate=(part("weighted_sum", term_weights={}),)),
        limit="one term: GRPO",
        basis="abstract",
        note="term_weights replaces single weights of reward.terms",
    ),
    "gdpo": Preset(
        title="GDPO: every term normalised in its group, then summed and whitened",
        source="2601.05242",
        plan=replace(
            CLIPPED,
            advantage=(
                part("normalize_each", term_weights={}, eps=1e-4, ddof=1),
                part("whiten_captions", batch_eps=1e-4),
            ),
        ),
        limit="one term: GRPO, then whitened over the batch",
        basis="code",
        note="weights are those of reward.terms; term_weights replaces single ones",
    ),
    "ensemble_worst_case": Preset(
        title="Reward ensemble, worst case (WCO)",
        source="2310.02743",
        plan=replace(CLIPPED, aggregate=(part("worst_of"),)),
        limit="equal terms: GRPO",
        basis="code",
        note="terms must share a scale; those of weight 0 are left out, other weights say nothing",
    ),
    "ensemble_uncertainty": Preset(
        title="Reward ensemble, weighted by uncertainty (UWO)",
        source="2310.02743",
        plan=replace(CLIPPED, aggregate=(part("mean_minus_variance", uncertainty=1.0),)),
        limit="equal terms or uncertainty 0: GRPO on the mean",
        basis="code",
        note="terms must share a scale; those of weight 0 are left out, other weights say nothing",
    ),
    "constrained_grpo": Preset(
        title="Constrained GRPO",
        source="2602.05863",
        plan=replace(
            CLIPPED,
            advantage=(
                part(
                    "lagrangian",
                    limits={"truncated": 0.05},
                    multiplier_start=0.0,
                    multiplier_lr=0.1,
                    per_component=True,
                    eps=1e-5,
                ),
            ),
        ),
        limit="multipliers 0: GRPO",
        basis="abstract",
        note="limits, start and rate have no published values",
    ),
    "mocan_one_shot": Preset(
        title="One-shot safety alignment by optimal dualization (MoCAN)",
        source="2405.19544",
        plan=replace(
            CLIPPED,
            aggregate=(part("with_multipliers", multipliers={}),),
            regularizers=(part("kl_k3", kl_coef=0.04),),
        ),
        limit="no multipliers: grpo_deepseekmath",
        basis="code",
        note="multipliers come from planners.optimal_multipliers, with kl_coef as temperature",
    ),
    "infalign_ctrl": Preset(
        title="InfAlign-CTRL: calibrated against the reference, tilted for best-of-n",
        source="2412.19792",
        plan=replace(
            CLIPPED,
            aggregate=(part("quantile_in_reference"), part("exponential_tilt", tilt=4.0)),
            regularizers=(part("kl_k3", kl_coef=0.04),),
        ),
        limit="any increasing map of all rewards changes nothing",
        basis="text",
        note="tilt is tuned to the decoding; no published value",
    ),
    "infalign_in_group": Preset(
        title="InfAlign with ranks in the group in place of the reference's captions",
        source="2412.19792",
        plan=replace(
            CLIPPED,
            aggregate=(part("quantile_in_group"), part("exponential_tilt", tilt=4.0)),
            regularizers=(part("kl_k3", kl_coef=0.04),),
        ),
        limit="any increasing map of a group's rewards changes nothing",
        basis="text",
    ),
    "cgpo_crpg": Preset(
        title="CGPO: calibrated, judged and KL-bounded rewards (CRPG)",
        source="2409.20370",
        plan=replace(
            REINFORCE,
            aggregate=(
                part("sigmoid_over_greedy"),
                part("judged"),
                part("kl_bounded", kl_max=2.0),
            ),
            advantage=(part("center_batch"),),
            reducer=part("sequence_mean_token_sum"),
        ),
        limit="the factors 1: REINFORCE with the batch's mean as baseline",
        basis="text",
        note="kl_max, in nats a caption, is a setting of the task",
    ),
    "ppo_c_calibrated": Preset(
        title="PPO-C: rewards calibrated by confidence",
        source="2410.09724",
        plan=replace(CLIPPED, aggregate=(part("by_confidence", average_rate=0.1),)),
        limit="confidence 1/2: GRPO",
        basis="code",
        note="the caption's mean token probability stands in for a stated confidence",
    ),
    "pref_grpo_win_rate": Preset(
        title="Pref-GRPO: win rates in the group",
        source="2508.20751",
        plan=replace(CLIPPED, aggregate=(part("win_rate", tie_margin=0.0),)),
        limit="two captions: the sign of the difference",
        basis="abstract",
        note="wins come from the rewards in place of a pairwise judge",
    ),
    "clip_reward_scst": Preset(
        title="Fine-grained captioning with CLIP reward",
        source="2205.13115",
        plan=replace(REINFORCE, advantage=(part("greedy_baseline"),)),
        limit="scst on other rewards",
        basis="code",
        note="under reward.terms: clip_score with weight 2, and with weight 1 a term of kind "
        "function or http for the paper's grammar score, which is a trained model",
    ),
    "carl_product": Preset(
        title="CaRL: multiplicative penalties",
        source="",
        plan=replace(CLIPPED, aggregate=(part("product", main_term="cider_d"),)),
        limit="all factors 1: GRPO",
        basis="abstract",
        note="the other terms, but those of weight 0, must be factors in [0, 1]",
    ),
    "harmonic_reward": Preset(
        title="Lambda-harmonic reward",
        source="",
        plan=replace(
            CLIPPED, aggregate=(part("harmonic_mean", main_term="cider_d", main_share=0.5),)
        ),
        limit="main_share 1 or 0: GRPO on one term",
        basis="recalled",
    ),
    "rto_token_reward": Preset(
        title="RTO: token rewards from a preference-tuned copy",
        source="2404.18922",
        plan=replace(
            CLIPPED,
            aggregate=(
                part(
                    "guided",
                    guide_weight=0.05,
                    guide_cap=0.05,
                    guide_kl=0.01,
                    outcome_weight=1.0,
                    outcome_cap=10.0,
                ),
            ),
            advantage=(part("reward_to_go", discount=1.0), part("center_by_position")),
            reducer=part("token_mean"),
        ),
        limit="guide_weight and guide_kl 0, equal lengths: the advantage of dr_grpo",
        basis="code",
        note="the group's mean at each position in place of the paper's critic",
    ),
    "capo_wrong_spans": Preset(
        title="CAPO: a judge marks wrong phrases",
        source="2508.02298",
        plan=replace(
            CLIPPED,
            aggregate=(part("wrong_spans", outcome_weight=2.0, span_penalty=1.0),),
            advantage=(part("normalize_tokens", eps=1e-5),),
        ),
        limit="span_penalty 0 and equal lengths: GRPO",
        basis="code",
    ),
    "igpo_info_gain": Preset(
        title="IGPO: information gain of each segment",
        source="2510.14967",
        plan=replace(
            CLIPPED,
            segments=part("fixed_length", segment_length=4),
            advantage=(part("information_gain", segment_discount=1.0, eps=1e-5),),
        ),
        limit="no gains: GRPO",
        basis="code",
        note="prefix_values: the reward of each prefix, whose gains add up to that of the caption",
    ),
    "asr_word_accuracy": Preset(
        title="GRPO for speech recognition: 1 - word error rate",
        source="",
        plan=replace(CLIPPED, aggregate=(part("only_term", main_term="word_accuracy"),)),
        limit="GRPO on another reward",
        basis="abstract",
    ),
    "otc_brevity": Preset(
        title="OTC-PO with tokens in place of tool calls",
        source="2504.14870",
        plan=replace(
            CLIPPED, labels=ABOVE_MEAN, aggregate=(part("brevity", efficiency_scale=1.0),)
        ),
        limit="equal lengths: GRPO",
        basis="recalled",
        note="good is what is above the group's mean",
    ),
    "grpo_lambda_length": Preset(
        title="GRPO-lambda: length counts once a group is good",
        source="2505.18086",
        plan=replace(
            CLIPPED,
            labels=part("above", good_reward=1.0),
            aggregate=(part("shorten_good_groups", length_weight=0.2, good_share=0.2),),
        ),
        limit="length_weight 0: GRPO",
        basis="recalled",
        note="good_reward is in units of the reward",
    ),
    "reward_model": Preset(
        title="GRPO on a learned reward model (InternLM-XComposer2.5-Reward)",
        source="2501.12368",
        plan=replace(CLIPPED, aggregate=(part("only_term", main_term="reward_model"),)),
        limit="GRPO on another reward",
        basis="abstract",
    ),
    "mpo_meta_policy": Preset(
        title="Meta policy optimization: an evolving reward model",
        source="2504.20157",
        plan=replace(CLIPPED, select=(part("one_reward_version"),)),
        limit="one version: GRPO",
        basis="abstract",
        note="a group that two versions scored is dropped and counted",
    ),
    "self_cider_diversity": Preset(
        title="NSC with what a caption adds to its group's diversity (Self-CIDEr)",
        source="1903.12020",
        plan=replace(
            REINFORCE,
            aggregate=(part("diversity_bonus", diversity_coef=0.5),),
            advantage=(part("leave_one_out"),),
        ),
        limit="diversity_coef 0: nsc",
        basis="code",
        note="the bonus is a leave-one-out difference; one that is equal in a group has no effect",
    ),
}
