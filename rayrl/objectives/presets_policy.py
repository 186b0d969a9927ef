"""Objectives that differ in the policy's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayrl.objectives.plan import Plan, part
from rayrl.objectives.preset_base import CLIPPED, REINFORCE, TRUNCATED_IS, Preset

SEQUENCE = replace(
    CLIPPED,
    ratio=part("sequence"),
    bounds=part("fixed", clip_low=3e-4, clip_high=4e-4),
)
MASKED = replace(
    CLIPPED,
    advantage=(part("group_center"),),
    surrogate=part("importance_weighted"),
    weights=(part("one_side"),),
    reducer=part("token_mean"),
)

POLICY: Mapping[str, Preset] = {
    "gspo": Preset(
        title="GSPO: the caption's geometric mean ratio is clipped",
        source="2507.18071",
        plan=SEQUENCE,
        limit="one-token captions: GRPO without KL",
        basis="code",
    ),
    "luspo": Preset(
        title="LUSPO: GSPO weighted by length",
        source="2602.05261",
        plan=replace(SEQUENCE, weights=(part("length"),)),
        limit="one-token captions: gspo",
        basis="code",
    ),
    "cispo": Preset(
        title="CISPO: every token keeps its gradient, only its weight is capped",
        source="2506.13585",
        plan=replace(
            CLIPPED,
            bounds=part("fixed", clip_low=1.0, clip_high=4.0),
            surrogate=part("clipped_weight"),
            reducer=part("token_mean"),
        ),
        limit="policy = old: REINFORCE; clip_high to infinity: importance-weighted REINFORCE",
        basis="code",
        note="the cap is 1 + clip_high; 5 in TRL",
    ),
    "gmpo": Preset(
        title="GMPO: geometric mean of clipped ratios",
        source="2507.20673",
        plan=replace(CLIPPED, bounds=None, surrogate=part("geometric_mean", log_clip=0.4)),
        limit="no token beyond log_clip: gspo without a clip",
        basis="code",
    ),
    "grpo_dual_clip": Preset(
        title="GRPO with a dual clip",
        source="1912.09729",
        plan=replace(CLIPPED, surrogate=part("min_clip", dual_clip=3.0)),
        limit="dual_clip to infinity: GRPO without KL",
        basis="code",
    ),
    "intellect2_two_sided": Preset(
        title="GRPO with a two-sided clip (INTELLECT-2)",
        source="2505.07291",
        plan=replace(CLIPPED, surrogate=part("min_clip", ratio_cap=4.0)),
        limit="ratio_cap to infinity: GRPO without KL",
        basis="code",
    ),
    "sapo": Preset(
        title="SAPO: a smooth gate in place of the clip",
        source="2511.20347",
        plan=replace(
            CLIPPED,
            bounds=None,
            surrogate=part("soft_gate", gate_positive=1.0, gate_negative=1.05),
        ),
        limit="policy = old: the gradient of GRPO",
        basis="code",
    ),
    "vespo": Preset(
        title="VESPO: soft weights of whole captions",
        source="2602.10693",
        plan=replace(
            REINFORCE,
            advantage=(part("group_normalize", eps=1e-4, ddof=1),),
            ratio=part("token"),
            weights=(
                part(
                    "soft_sequence",
                    power_positive=2.0,
                    decay_positive=3.0,
                    power_negative=3.0,
                    decay_negative=2.0,
                ),
            ),
        ),
        limit="policy = old: REINFORCE",
        basis="code",
    ),
    "topr": Preset(
        title="TOPR: tapered weights for bad captions",
        source="2503.14286",
        plan=replace(REINFORCE, ratio=part("token"), weights=(part("tapered"),)),
        limit="policy = old: REINFORCE",
        basis="code",
    ),
    "r2vpo": Preset(
        title="R2VPO: the ratio's variance penalised",
        source="2601.03320",
        plan=replace(CLIPPED, bounds=None, surrogate=part("ratio_variance", penalty=0.04)),
        limit="penalty 0: espo_early_stop without the stop",
        basis="code",
    ),
    "bapo_adaptive_clip": Preset(
        title="BAPO: bounds that balance positive and negative mass",
        source="2510.18927",
        plan=replace(
            CLIPPED,
            bounds=part(
                "balanced",
                low_range=(0.6, 0.9),
                high_range=(1.2, 3.0),
                bound_step=0.05,
                balance=1.0,
            ),
            surrogate=part("min_clip", dual_clip=3.0),
            reducer=part("token_mean"),
        ),
        limit="balance 0: fixed bounds 0.6 and 1.2",
        basis="code",
    ),
    "espo_early_stop": Preset(
        title="ESPO: no clip, inner epochs stop early",
        source="2202.00079",
        plan=replace(
            CLIPPED,
            bounds=None,
            surrogate=part("unclipped"),
            control=(part("stop_on_ratio", max_ratio_deviation=0.25),),
        ),
        limit="one update: the REINFORCE surrogate",
        basis="code",
    ),
    "rec_one_side": Preset(
        title="REC: REINFORCE masked on the side of the update",
        source="2509.24203",
        plan=MASKED,
        limit="the gradient of the PPO clip",
        basis="code",
    ),
    "rec_two_side": Preset(
        title="REC: REINFORCE masked on both sides",
        source="2509.24203",
        plan=replace(MASKED, weights=(part("two_side"),)),
        limit="no token masked: importance-weighted REINFORCE",
        basis="code",
    ),
    "rec_ring": Preset(
        title="REC: masked, except far outside where the advantage pulls back",
        source="2509.24203",
        plan=replace(MASKED, weights=(part("ring", ring_low=0.6, ring_high=2.0),)),
        limit="no token masked: importance-weighted REINFORCE",
        basis="code",
    ),
    "opmd": Preset(
        title="Online policy mirror descent (OPMD)",
        source="2509.24203",
        plan=replace(REINFORCE, surrogate=part("opmd", opmd_temperature=1.0)),
        limit="opmd_temperature 0: REINFORCE with the group's mean",
        basis="code",
    ),
    "opmd_log_mean_exp": Preset(
        title="OPMD with the soft value of the group as its baseline",
        source="2509.24203",
        plan=replace(
            REINFORCE,
            advantage=(part("log_mean_exp_baseline", baseline_temperature=1.0),),
            surrogate=part("opmd", opmd_temperature=1.0),
        ),
        limit="baseline_temperature to infinity: opmd",
        basis="code",
    ),
    "opmd_squared": Preset(
        title="OPMD with the squared log-ratio as its proximal term",
        source="2509.24203",
        plan=replace(
            REINFORCE,
            ratio=part("token"),
            surrogate=part("squared_penalty", penalty=0.1),
        ),
        limit="penalty 0: REINFORCE with the group's mean",
        basis="code",
    ),
    "sso": Preset(
        title="Target-based surrogates: proximal in the space of log-probs (SSO)",
        source="2302.02607",
        plan=replace(
            CLIPPED,
            bounds=None,
            surrogate=part("proximal", step_size=0.5),
            reducer=part("token_mean"),
        ),
        limit="one update: REINFORCE",
        basis="recalled",
    ),
    "grpo_guard_ratio_norm": Preset(
        title="GRPO-Guard: ratios recentred at every position",
        source="2510.22319",
        plan=replace(CLIPPED, ratio=part("recentered")),
        limit="log-ratios centred with equal spread: GRPO without KL",
        basis="text",
        note="token positions in place of flow steps",
    ),
    "awm_advantage_weighted": Preset(
        title="AWM: the pre-training loss weighted by the advantage",
        source="2509.25050",
        plan=replace(REINFORCE, advantage=(part("group_normalize", eps=1e-4, ddof=0),)),
        limit="REINFORCE with GRPO's advantage",
        basis="abstract",
    ),
    "rwr_softmax": Preset(
        title="Reward-weighted regression, softmax over the group (Flow-RWR)",
        source="",
        plan=replace(
            REINFORCE,
            advantage=(part("softmax_weight", weight_temperature=0.5),),
            reducer=part("sequence_mean_token_sum"),
        ),
        limit="weight_temperature to 0: best-of-n; to infinity: cross-entropy on all captions",
        basis="recalled",
    ),
    "chunk_grpo": Preset(
        title="Chunk-GRPO: one ratio for each run of tokens",
        source="",
        plan=replace(
            CLIPPED,
            segments=part("fixed_length", segment_length=4),
            ratio=part("segment"),
        ),
        limit="segment_length 1: GRPO without KL; the caption: gspo",
        basis="abstract",
        note="tokens in place of flow steps",
    ),
    "bgpo_linear_bound": Preset(
        title="BGPO: a linear bound for good captions",
        source="2510.11683",
        plan=replace(CLIPPED, surrogate=part("linear_bound")),
        limit="policy = old: the gradient of GRPO",
        basis="abstract",
    ),
    "clip_cov": Preset(
        title="Clip-Cov: tokens of the largest covariance left out",
        source="2505.22617",
        plan=replace(
            CLIPPED,
            weights=(part("without_covariance", covariance_share=2e-4),),
            reducer=part("token_mean"),
        ),
        limit="covariance_share 0: GRPO without KL but for one token",
        basis="code",
    ),
    "kl_cov": Preset(
        title="KL-Cov: tokens of the largest covariance held back",
        source="2505.22617",
        plan=replace(
            CLIPPED,
            bounds=None,
            surrogate=part("unclipped"),
            regularizers=(
                part("kl_high_covariance", covariance_share=2e-4, covariance_kl_coef=1.0),
            ),
            reducer=part("token_mean"),
        ),
        limit="covariance_kl_coef 0: unclipped GRPO",
        basis="code",
    ),
    "high_entropy_tokens": Preset(
        title="DAPO's clip on the fifth of the tokens with the highest entropy",
        source="2506.01939",
        plan=replace(
            CLIPPED,
            bounds=part("fixed", clip_low=0.2, clip_high=0.28),
            weights=(part("high_entropy", entropy_share=0.2),),
            reducer=part("token_mean"),
        ),
        limit="entropy_share 1: all tokens",
        basis="docs",
    ),
    "two_stage_constrained": Preset(
        title="Two-stage constrained actor-critic: near one policy for each auxiliary reward",
        source="",
        plan=Plan(
            advantage=(part("group_center"),),
            surrogate=part("constrained_actor", auxiliary_weight=0.5, actor_temperature=1.0),
            mismatch=TRUNCATED_IS,
        ),
        limit="no auxiliary policy: exponentially weighted regression",
        basis="recalled",
    ),
}
