"""The general objectives: GRPO, SCST and their nearest relatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rayrl.objectives.plan import part
from rayrl.objectives.preset_base import CLIPPED, MAX_TOKENS, REINFORCE, Preset

K3 = part("kl_k3", kl_coef=0.04)

CORE: Mapping[str, Preset] = {
    "grpo": Preset(
        title="GRPO for image captioning",
        source="2503.01333",
        plan=replace(
            CLIPPED,
            advantage=(part("group_normalize", eps=1e-5, ddof=0),),
            reducer=part("token_mean"),
            regularizers=(K3,),
        ),
        limit="one update and kl_coef 0: nsc times (G-1)/G, over the group's spread",
        basis="code",
        note="the default",
        recommended=True,
    ),
    "grpo_deepseekmath": Preset(
        title="GRPO as first published (DeepSeekMath)",
        source="2402.03300",
        plan=replace(CLIPPED, regularizers=(K3,)),
        limit="one update and kl_coef 0: reinforce with a group baseline, over the group's spread",
        basis="code",
    ),
    "reinforce": Preset(
        title="REINFORCE without a baseline",
        source="",
        plan=replace(
            REINFORCE,
            advantage=(part("raw_reward"),),
            reducer=part("sequence_mean_token_sum"),
        ),
        limit="the gradient that every clipped loss has at policy = old",
        basis="docs",
    ),
    "scst": Preset(
        title="Self-critical sequence training",
        source="1612.00563",
        plan=replace(REINFORCE, advantage=(part("greedy_baseline"),)),
        limit="the group's mean in place of the greedy reward: the advantage of dr_grpo",
        basis="code",
        recommended=True,
    ),
    "nsc": Preset(
        title="A better variant of self-critical sequence training",
        source="2003.09971",
        plan=replace(REINFORCE, advantage=(part("leave_one_out"),)),
        limit="the advantage of dr_grpo times G/(G-1)",
        basis="code",
        recommended=True,
    ),
    "remax": Preset(
        title="ReMax",
        source="2310.10505",
        plan=replace(
            REINFORCE,
            aggregate=(part("kl_penalty", reward_kl_coef=0.0),),
            advantage=(part("greedy_baseline"),),
            reducer=part("sequence_mean_token_sum"),
        ),
        limit="scst but for the reducer",
        basis="code",
    ),
    "rloo": Preset(
        title="RLOO",
        source="2402.14740",
        plan=replace(
            REINFORCE,
            aggregate=(part("kl_penalty", reward_kl_coef=0.03),),
            advantage=(part("leave_one_out"),),
            reducer=part("sequence_mean_token_sum"),
        ),
        limit="reward_kl_coef 0: nsc but for the reducer",
        basis="code",
    ),
    "reinforce_plus_plus": Preset(
        title="REINFORCE++",
        source="2501.03262",
        plan=replace(
            CLIPPED,
            aggregate=(part("terminal"), part("token_kl_penalty", reward_kl_coef=0.0)),
            advantage=(part("reward_to_go", discount=1.0), part("whiten_tokens", eps=1e-8)),
            reducer=part("token_mean"),
        ),
        limit="flat groups keep a signal; no group baseline",
        basis="code",
    ),
    "reinforce_plus_plus_baseline": Preset(
        title="REINFORCE++ with the group's mean as baseline",
        source="2501.03262",
        plan=replace(
            CLIPPED,
            advantage=(part("group_center"), part("whiten_batch", eps=1e-8)),
            reducer=part("token_mean"),
        ),
        limit="one image in the batch and equal lengths: GRPO's advantage",
        basis="code",
    ),
    "dr_grpo": Preset(
        title="Dr.GRPO",
        source="2503.20783",
        plan=replace(
            CLIPPED,
            advantage=(part("group_center"),),
            reducer=part("constant_length", max_tokens=MAX_TOKENS),
        ),
        limit="GRPO's advantage where the group's spread is 1",
        basis="code",
        note="max_tokens follows sampling.max_tokens",
        recommended=True,
    ),
    "dapo": Preset(
        title="DAPO",
        source="2503.14476",
        plan=replace(
            CLIPPED,
            rollout=(part("refill", min_spread=0.0, refill_rounds=3),),
            select=(part("spread_above", min_spread=0.0), part("not_truncated")),
            aggregate=(
                part(
                    "overlong_penalty",
                    overlong_coef=1.0,
                    max_tokens=MAX_TOKENS,
                    grace_tokens=5,
                ),
            ),
            advantage=(part("group_normalize", eps=1e-6, ddof=1),),
            bounds=part("fixed", clip_low=0.2, clip_high=0.28),
            reducer=part("token_mean"),
        ),
        limit="clip_high 0.2, nothing selected, equal lengths: grpo without KL",
        basis="code",
        note="lengths scaled from 20480 and 4096; max_tokens follows sampling.max_tokens; "
        "refilling stops after refill_rounds",
        recommended=True,
    ),
    "lite_ppo": Preset(
        title="Lite-PPO",
        source="2508.08221",
        plan=replace(
            CLIPPED,
            advantage=(part("group_center"), part("over_batch_std", eps=1e-6)),
            reducer=part("token_mean"),
        ),
        limit="one image in the batch: GRPO's advantage",
        basis="code",
    ),
    "gpg": Preset(
        title="Group policy gradient (GPG)",
        source="2504.02546",
        plan=replace(REINFORCE, advantage=(part("nonzero_scaled"),)),
        limit="no reward is 0: the advantage of dr_grpo",
        basis="code",
    ),
    "opo": Preset(
        title="OPO: length-weighted baseline",
        source="2505.23585",
        plan=replace(
            REINFORCE,
            advantage=(part("length_weighted_baseline"),),
            reducer=part("sequence_mean_token_sum"),
        ),
        limit="equal lengths: the advantage of dr_grpo",
        basis="code",
    ),
    "otb": Preset(
        title="Token baseline of least variance (OTB)",
        source="",
        plan=replace(REINFORCE, advantage=(part("token_baseline"),)),
        limit="equal energy of all captions: the advantage of dr_grpo",
        basis="code",
    ),
    "pass_at_k": Preset(
        title="pass@k GRPO",
        source="2503.19595",
        plan=replace(REINFORCE, advantage=(part("best_over_second"),)),
        limit="two captions: the better one gets the difference",
        basis="code",
    ),
    "maxrl": Preset(
        title="MaxRL",
        source="2602.02710",
        plan=replace(REINFORCE, advantage=(part("relative_to_mean"),)),
        limit="mean reward 1: the advantage of dr_grpo",
        basis="code",
        note="for rewards of 0 and 1; groups whose mean is not positive are left out",
    ),
    "deepseek_v32": Preset(
        title="GRPO of DeepSeek-V3.2: unbiased KL, stale negative captions dropped",
        source="2512.02556",
        plan=replace(
            CLIPPED,
            weights=(part("not_stale_negative", stale_kl=0.5),),
            regularizers=(part("kl_k3_weighted", kl_coef=0.001),),
        ),
        limit="policy = old: the loss of grpo_deepseekmath with this coefficient",
        basis="code",
        note="stale_kl has no published value; the gradient of its KL is that of k2",
    ),
    "icepop": Preset(
        title="GRPO with masked importance sampling (IcePop)",
        source="",
        plan=replace(CLIPPED, mismatch=part("token_masked", is_low=0.5, is_high=2.0)),
        limit="engine = learner: GRPO without KL",
        basis="code",
    ),
    "grpo_sequence_is": Preset(
        title="GRPO with truncated importance sampling of whole captions",
        source="",
        plan=replace(CLIPPED, mismatch=part("sequence_truncated", is_cap=2.0)),
        limit="engine = learner: GRPO without KL",
        basis="code",
    ),
    "grpo_geometric_rejection": Preset(
        title="GRPO that drops captions whose mean ratio of learner to engine is off",
        source="",
        plan=replace(CLIPPED, mismatch=part("geometric_masked", is_low=0.999, is_high=1.001)),
        limit="engine = learner: GRPO without KL",
        basis="code",
    ),
}
