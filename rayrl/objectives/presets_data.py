"""Objectives that differ in the batch: selection, resampling, hints, trees; and regularizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayrl.objectives.plan import Plan, part
from rayrl.objectives.preset_base import CLIPPED, REINFORCE, Preset

BEST_OF_N = Plan(
    select=(part("best_of_group"),),
    surrogate=part("nll"),
    reducer=part("sequence_mean_token_mean"),
)
DATA: Mapping[str, Preset] = {
    "pf_ppo_filtration": Preset(
        title="PF-PPO: captions resampled by reward",
        source="2409.06957",
        plan=replace(CLIPPED, select=(part("resample_by_power", reward_power=2.0),)),
        limit="reward_power 0: GRPO",
        basis="code",
        note="drawn within the group; advantages are those of the whole group",
    ),
    "superhf_best_of_n": Preset(
        title="SuperHF: cross-entropy on the best caption, with a KL prior",
        source="2310.16763",
        plan=replace(BEST_OF_N, regularizers=(part("kl_k3", kl_coef=0.04),)),
        limit="as weight_temperature goes to 0: rwr_softmax, but for the reducer",
        basis="abstract",
    ),
    "raft_crraft": Preset(
        title="Calibrated RAFT: the best caption that passes, weighted by its lead over greedy",
        source="2409.20370",
        plan=replace(
            BEST_OF_N,
            select=(
                part("satisfies_judges"),
                part("near_reference", kl_max=2.0),
                part("best_of_group"),
            ),
            aggregate=(part("sigmoid_over_greedy"),),
            advantage=(part("raw_reward"),),
            surrogate=part("reinforce"),
        ),
        limit="the calibration 1: best-of-n",
        basis="text",
        note="images without a passing caption are skipped",
    ),
    "red_drop": Preset(
        title="RED: bad captions dropped until they balance the good ones",
        source="2509.24203",
        plan=replace(
            REINFORCE,
            select=(part("balanced"),),
            statistics_of="kept",
        ),
        limit="a balanced group: REINFORCE with the group's mean",
        basis="code",
    ),
    "red_weight": Preset(
        title="RED: exponentially weighted advantages",
        source="2509.24203",
        plan=replace(
            REINFORCE,
            advantage=(
                part("group_center"),
                part("exponential_weight", exponent_temperature=1.0),
            ),
        ),
        limit="exponent_temperature to infinity: REINFORCE with the group's mean",
        basis="code",
    ),
    "ghpo_reference_hints": Preset(
        title="GHPO: failing images are sampled again after part of a reference",
        source="2507.10628",
        plan=replace(
            CLIPPED,
            rollout=(part("hint_by_prefix", hint_floor=0.0, hint_shares=(0.25, 0.5, 0.75)),),
            mask=(part("sampled_only"),),
        ),
        limit="no group fails: GRPO",
        basis="text",
        note="a group is hinted as a whole, because a copied prefix raises CIDEr by itself",
    ),
    "guide_grpo": Preset(
        title="Guide: hinted captions train the policy without the hint",
        source="2506.13923",
        plan=replace(
            CLIPPED,
            rollout=(part("hint_in_context", hint_floor=0.0, hint_words=6, guided=4),),
            ratio=part("over_rollout"),
            mismatch=None,
        ),
        limit="no hint: GRPO",
        basis="abstract",
        note="rollout_logprobs are those with the hint; the failed captions stay in the group",
    ),
    "dynamic_tree_rpo": Preset(
        title="Dynamic-TreeRPO: captions that branch from shared prefixes",
        source="",
        plan=replace(
            CLIPPED,
            rollout=(part("branch", tree_depths=(5,), tree_width=2),),
            advantage=(part("prefix_tree", eps=1e-5),),
        ),
        limit="a branch at depth 0: independent captions",
        basis="abstract",
        note="credit by the tree's own values",
    ),
    "igpo_inpainting": Preset(
        title="IGPO (inpainting): captions with forced spans join a failing group",
        source="2509.10396",
        plan=replace(
            CLIPPED,
            rollout=(part("inject_prefix", hint_floor=0.0, hint_shares=(0.5,), injected=2),),
            weights=(part("forced_high_entropy", forced_share=0.3),),
        ),
        limit="nothing injected: GRPO",
        basis="abstract",
        note="an autoregressive model can only inject a prefix",
    ),
    "reward_ranker": Preset(
        title="RewardRanker: the scorer is retrained on its mistakes between rounds",
        source="",
        plan=replace(
            CLIPPED,
            aggregate=(part("self_trained_scorer", scorer_passes=100, scorer_memory=512),),
        ),
        limit="a frozen scorer: GRPO on its scores",
        basis="abstract",
        note="a linear scorer on the reference model's hidden states; the run's reward is the true "
        "one, which finds its mistakes; no published sizes",
    ),
    "chi_squared_regularized": Preset(
        title="Correlated proxies: chi-squared regularization as a loss (ORPO)",
        source="2403.03185",
        plan=replace(
            CLIPPED,
            regularizers=(part("chi_squared", chi_coef=8e-4, chi_floor=1e-4, chi_limit=10.0),),
        ),
        limit="policy = reference: no gradient from the regularizer",
        basis="code",
    ),
    "chi_squared_reward": Preset(
        title="Correlated proxies: chi-squared regularization in the reward",
        source="2403.03185",
        plan=replace(
            CLIPPED,
            aggregate=(part("chi_squared_penalty", reward_chi_coef=8e-4),),
            advantage=(part("group_center"),),
        ),
        limit="reward_chi_coef 0: the advantage of dr_grpo",
        basis="code",
    ),
    "grpo_entropy": Preset(
        title="GRPO with an entropy bonus",
        source="",
        plan=replace(CLIPPED, regularizers=(part("entropy_bonus", entropy_coef=0.01),)),
        limit="entropy_coef 0: GRPO without KL",
        basis="code",
    ),
    "grpo_adaptive_entropy": Preset(
        title="GRPO with an entropy bonus that holds a target (Skywork-OR1)",
        source="2505.22312",
        plan=replace(
            CLIPPED,
            regularizers=(part("entropy_bonus", entropy_coef=0.01),),
            control=(part("adaptive_entropy", entropy_target=1.0, entropy_step=0.005),),
        ),
        limit="entropy above its target: GRPO without KL",
        basis="code",
        note="entropy_target, in nats a token, depends on the model",
    ),
    "grpo_adaptive_kl": Preset(
        title="GRPO with a KL coefficient that holds a target",
        source="1909.08593",
        plan=replace(
            CLIPPED,
            regularizers=(part("kl_k3", kl_coef=0.04),),
            control=(part("adaptive_kl", kl_target=0.02, kl_horizon=10.0),),
        ),
        limit="KL at its target: grpo_deepseekmath",
        basis="code",
    ),
    "grpo_reference_nll": Preset(
        title="GRPO with cross-entropy on the references (PPO-ptx)",
        source="2203.02155",
        plan=replace(CLIPPED, regularizers=(part("nll_references", nll_coef=0.1),)),
        limit="nll_coef 0: GRPO without KL",
        basis="docs",
    ),
}
