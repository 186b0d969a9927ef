"""Objectives that differ in the advantage, critics included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayrl.objectives.plan import part
from rayrl.objectives.preset_base import CLIPPED, REINFORCE, Preset

CRITIC = replace(
    CLIPPED,
    advantage=(
        part("gae", discount=1.0, gae_lambda=0.95, bootstrap_truncated=False),
        part("whiten_tokens", eps=1e-8),
    ),
    regularizers=(part("value_error", value_coef=0.5, value_clip=0.2, finished_only=False),),
    reducer=part("token_mean"),
)

ADVANTAGE: Mapping[str, Preset] = {
    "krpo_kalman": Preset(
        title="KRPO: Kalman-filtered baseline",
        source="2505.07527",
        plan=replace(
            CLIPPED,
            advantage=(part("kalman", scope="group", process_noise=1e-5, measurement_noise=1e-2),),
            regularizers=(part("kl_k3", kl_coef=0.01),),
        ),
        limit="no process noise, a wide prior: the baseline of the last caption is the mean",
        basis="code",
        note="depends on the order of the captions; scope=stream filters the batches' means",
    ),
    "ngrpo_virtual_best": Preset(
        title="NGRPO: a virtual best caption in every group",
        source="2509.18851",
        plan=replace(
            CLIPPED,
            select=(part("not_all_good", good_reward=1.0),),
            advantage=(part("virtual_best", best_reward=1.0, virtual_copies=1, eps=1e-6),),
            bounds=part("fixed", clip_low=0.16, clip_high=0.24),
        ),
        limit="virtual_copies 0: GRPO",
        basis="code",
        note="best_reward and good_reward are in units of the reward, which has no ceiling",
    ),
    "dcpo_dynamic_clip": Preset(
        title="DCPO: dynamic clipping, smoothed advantages",
        source="2509.02333",
        plan=replace(
            CLIPPED,
            advantage=(part("smoothed", ddof=1, eps=1e-6),),
            bounds=part("by_probability", clip_low=0.16, clip_high=0.2, highest=10.0),
            surrogate=part("min_clip", dual_clip=10.0),
            reducer=part("sequence_sum_token_mean"),
        ),
        limit="an image's first visit: GRPO's advantage",
        basis="code",
        note="the sum over captions wants a learning rate for this number of them",
    ),
    "copo_consistency": Preset(
        title="COPO: local and global advantages, blended by entropy",
        source="2508.04138",
        plan=replace(
            CLIPPED,
            advantage=(
                part(
                    "local_and_global",
                    outcome_width=0.1,
                    blend_slope=20.0,
                    blend_entropy=0.5,
                    eps=1e-5,
                ),
            ),
            regularizers=(part("kl_k3", kl_coef=0.001),),
        ),
        limit="high entropy everywhere: GRPO; flat groups learn through the global half",
        basis="code",
        note="rewards within outcome_width count as one outcome",
    ),
    "tempo_prefix_tree": Preset(
        title="TEMPO: credit at the branches of the group's prefix tree",
        source="2509.18314",
        plan=replace(CLIPPED, advantage=(part("prefix_tree", eps=1e-5),)),
        limit="no shared first token: only the first token differs from GRPO",
        basis="code",
    ),
    "spo_segment": Preset(
        title="SPO: values at segment boundaries (chain)",
        source="2505.23564",
        plan=replace(
            CLIPPED,
            segments=part("at_improbable", cut_probability=0.9, cut_every=5),
            advantage=(part("segment_gain"),),
            mask=(part("improbable", probable=0.9),),
            regularizers=(part("kl_k3", kl_coef=1e-4),),
        ),
        limit="one segment: the advantage of dr_grpo",
        basis="recalled",
        note="a prefix's value is its reward as a caption, in place of the paper's continuations",
    ),
    "spo_segment_tree": Preset(
        title="SPO with the values of the group's own prefix tree",
        source="2505.23564",
        plan=replace(
            CLIPPED,
            segments=part("at_improbable", cut_probability=0.9, cut_every=5),
            advantage=(part("segment_gain_in_tree"),),
            mask=(part("improbable", probable=0.9),),
            regularizers=(part("kl_k3", kl_coef=1e-4),),
        ),
        limit="one segment: the advantage of dr_grpo",
        basis="recalled",
    ),
    "xrpo_novelty": Preset(
        title="XRPO: novelty sharpening, and captions for images that need them",
        source="2510.06672",
        plan=replace(
            CLIPPED,
            rollout=(part("allocate", exploration=0.1, extra_share=0.25),),
            advantage=(
                part("group_normalize", eps=1e-4, ddof=1),
                part("favour_novel", novelty=1.0, novelty_cap=1.0),
            ),
        ),
        limit="novelty 0: GRPO",
        basis="code",
        note="extra_share: captions of the second round over those of the first",
    ),
    "asymre_shifted": Preset(
        title="AsymRE: a baseline below the mean",
        source="2509.24203",
        plan=replace(REINFORCE, advantage=(part("shifted_baseline", baseline_shift=-0.1),)),
        limit="baseline_shift 0: the advantage of dr_grpo",
        basis="code",
        note="baseline_shift is in units of the reward",
    ),
    "vgpo_value_anchor": Preset(
        title="VGPO: an absolute value term beside the group's (group half)",
        source="",
        plan=replace(
            CLIPPED, advantage=(part("anchored", anchor_weight=0.1, anchor_reward=0.5, eps=1e-5),)
        ),
        limit="anchor_weight 0: GRPO",
        basis="abstract",
        note="anchor_reward: the stage-1 model's mean reward; the temporal half is of flow models",
    ),
    "ppo_max": Preset(
        title="PPO-max: rewards normalised by history, a critic, NLL on references",
        source="2307.04964",
        plan=replace(
            CRITIC,
            aggregate=(
                part("history_normalized", reward_clip=1.5),
                part("terminal"),
                part("token_kl_penalty", reward_kl_coef=0.02),
            ),
            regularizers=(
                *CRITIC.regularizers,
                part("nll_references", nll_coef=0.01),
            ),
        ),
        limit="no clip and no history: PPO",
        basis="recalled",
        note="constants are not verified",
    ),
    "ppo": Preset(
        title="PPO with a critic",
        source="1707.06347",
        plan=CRITIC,
        limit="values 0 and gae_lambda 1: REINFORCE++ without KL",
        basis="code",
    ),
    "t_ppo_truncated": Preset(
        title="T-PPO: EGAE for captions that are cut",
        source="2506.15050",
        plan=replace(
            CRITIC,
            advantage=(part("gae", discount=1.0, gae_lambda=1.0, bootstrap_truncated=True),),
            regularizers=(part("value_error", value_coef=0.5, value_clip=0.2, finished_only=True),),
        ),
        limit="nothing cut: ppo at gae_lambda 1 without whitening",
        basis="text",
        note="a caption at max_tokens ends with its value; the paper continues it in the next step",
    ),
    "poad_action_decomposition": Preset(
        title="POAD: one-step differences of token values",
        source="2405.15821",
        plan=replace(
            CRITIC,
            advantage=(part("gae", discount=1.0, gae_lambda=0.0, bootstrap_truncated=False),),
        ),
        limit="gae_lambda 1: the return minus the value",
        basis="recalled",
    ),
}
