"""What the table of the presets calls their limits: there the preset is another one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from objectives_toy import (
    F64,
    FLAT,
    MASK,
    OLD,
    POLICY,
    REF,
    REWARDS,
    advantages_of,
    assert_close,
    loss_of,
    prepared,
    tensor,
    toy_batch,
)

from rayrl.objectives import preset
from rayrl.objectives.batch import GroupBatch

LONG = torch.ones(1, 4, 3, dtype=torch.bool)
GRPO = ("grpo_deepseekmath", {"kl_coef": 0.0})
TWO = {"cider_d": REWARDS, "clip_score": torch.ones_like(REWARDS)}
ZEROS = torch.zeros(1, 4, 3, dtype=F64)

# Preset and overrides; the preset that it then is, and its overrides; what the batch has.
SAME_LOSS: dict[str, tuple[dict[str, Any], tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "gpg": ({}, ("nsc", {"advantage": "group_center"}), {}),
    "opo": (
        {"reducer": "token_mean"},
        ("nsc", {"advantage": "group_center"}),
        {"mask": LONG},
    ),
    "grpo_sequence_is": ({}, GRPO, {}),
    "grpo_geometric_rejection": ({}, GRPO, {}),
    "ensemble_uncertainty": ({}, GRPO, {"terms": {"a": REWARDS, "b": REWARDS}}),
    "mocan_one_shot": ({}, ("grpo_deepseekmath", {}), {"terms": TWO}),
    "ppo_c_calibrated": (
        {},
        GRPO,
        {"old_logprobs": MASK * math.log(0.5), "rollout_logprobs": MASK * math.log(0.5)},
    ),
    "clip_reward_scst": ({}, ("scst", {}), {"greedy_rewards": tensor([0.6])}),
    "carl_product": ({}, GRPO, {"terms": TWO}),
    "capo_wrong_spans": (
        {"span_penalty": 0.0, "eps": 0.0},
        ("grpo_deepseekmath", {"kl_coef": 0.0, "eps": 0.0, "ddof": 0}),
        {"mask": LONG, "token_credit": ZEROS},
    ),
    "otc_brevity": ({}, GRPO, {"mask": LONG}),
    "grpo_lambda_length": ({"length_weight": 0.0}, GRPO, {}),
    "self_cider_diversity": (
        {"diversity_coef": 0.0},
        ("nsc", {}),
        {"similarity": torch.eye(4, dtype=F64)[None]},
    ),
    "opmd_log_mean_exp": ({"baseline_temperature": 1e7}, ("opmd", {}), {}),
    "kl_cov": (
        {"covariance_kl_coef": 0.0},
        ("espo_early_stop", {"reducer": "token_mean"}),
        {},
    ),
    "red_weight": ({"exponent_temperature": 1e9}, ("nsc", {"advantage": "group_center"}), {}),
    "guide_grpo": ({}, GRPO, {}),
    "igpo_inpainting": ({}, GRPO, {"forced": torch.zeros_like(MASK)}),
    "grpo_reference_nll": ({"nll_coef": 0.0}, GRPO, {}),
    "seppo_earlier": (
        {},
        ("online_dpo", {}),
        # The caption that is there from before is the worst.
        {"earlier": torch.tensor([[True, False, False, False]])},
    ),
    "t_ppo_truncated": (
        {"finished_only": False},
        ("ppo", {"advantage": "gae", "gae_lambda": 1.0}),
        {"values": 0.1 * MASK},
    ),
}


def batch_of(changes: dict[str, Any]) -> GroupBatch:
    mask = changes.get("mask", MASK)
    filled = {"old_logprobs": OLD, "rollout_logprobs": OLD, "ref_logprobs": REF}
    return toy_batch(**{**filled, **changes, "mask": mask})


@pytest.mark.parametrize("name", SAME_LOSS)
def test_at_its_limit_a_preset_has_the_loss_of_another(name: str) -> None:
    overrides, (other, others), changes = SAME_LOSS[name]
    batch = batch_of(changes)
    policy = batch.old_logprobs + (POLICY - OLD)
    graph = {"entropy": torch.ones_like(ZEROS), "policy_values": 0.3 * MASK}
    got = loss_of(name, batch, policy, overrides, **graph)
    assert got == pytest.approx(loss_of(other, batch, policy, others, **graph), abs=1e-6)
    assert abs(got) > 1e-3


def credit(name: str, batch: GroupBatch, **overrides: Any) -> torch.Tensor:
    """Advantages [P,G,T], 0 on padding."""
    got = prepared(preset(name, **overrides), batch).fields["advantages"][:, 0]
    return torch.where(batch.mask, got.expand_as(batch.mask), 0.0)


CENTRED = REWARDS - 0.7
PREFIXES = {"prefix_values": torch.full((1, 4, 4), 0.7, dtype=F64)}

# Preset, overrides, what the batch has, and the advantages [G] that all tokens then have.
ADVANTAGES: dict[str, tuple[dict[str, Any], dict[str, Any], torch.Tensor]] = {
    "otb": (
        {},
        {"mask": LONG, "old_logprobs": ZEROS - 1, "collision": ZEROS + 0.4},
        CENTRED,
    ),
    "rto_token_reward": (
        {"guide_weight": 0.0, "guide_kl": 0.0},
        {"mask": LONG, "guide_logprobs": REF},
        CENTRED,
    ),
    "chi_squared_reward": ({"reward_chi_coef": 0.0}, {}, CENTRED),
    "spo_segment": ({"cut_every": 9}, PREFIXES, CENTRED),
    # Distinct captions, two of which share their first token.
    "spo_segment_tree": (
        {"cut_every": 9},
        {"token_ids": torch.tensor([[[1, 2, 3], [1, 4, 5], [6, 7, 8], [9, 9, 9]]])},
        CENTRED,
    ),
    "igpo_info_gain": (
        {"segment_length": 9, "eps": 0.0},
        PREFIXES,
        CENTRED / REWARDS.std(correction=0),
    ),
    "poad_action_decomposition": (
        {"gae_lambda": 1.0},
        {"values": 0.3 * MASK.double()},
        REWARDS - 0.3,
    ),
    "cgpo_crpg": (
        {"kl_max": 1e12},
        {"greedy_rewards": tensor([0.6]), "judge_ok": torch.ones(1, 4, dtype=torch.bool)},
        torch.sigmoid(REWARDS - 0.6) - torch.sigmoid(REWARDS - 0.6).mean(),
    ),
    "copo_consistency": (
        {"outcome_width": 0.01, "blend_entropy": 0.0, "blend_slope": 1e3},
        {},
        (CENTRED / REWARDS.std()),
    ),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_at_its_limit_a_preset_has_these_advantages(name: str) -> None:
    overrides, changes, want = ADVANTAGES[name]
    batch = batch_of(changes)
    if name == "copo_consistency":
        # A second group, for there is no global half of one.
        pair = toy_batch(torch.cat([REWARDS, REWARDS]))
        got = prepared(preset(name, **overrides), pair).fields["advantages"].sum(1)
        assert_close(got[0], want[0, :, None].expand(4, 1), 1e-4)
        return
    want = torch.where(batch.mask, want[..., None].expand_as(batch.mask), 0.0)
    assert_close(credit(name, batch, **overrides), want, 1e-9)


def test_without_values_ppo_is_reinforce_plus_plus() -> None:
    batch = batch_of({"values": ZEROS})
    want = credit("reinforce_plus_plus", batch)
    assert_close(credit("ppo", batch, gae_lambda=1.0), want, 1e-12)
    assert float(want.abs().max()) > 1.0


def test_ppo_max_on_rewards_in_their_range_is_ppo_on_normalised_ones() -> None:
    batch = batch_of({"values": ZEROS})
    spread = replace(batch, rewards=CENTRED / REWARDS.std(correction=0))
    got = credit("ppo_max", batch, reward_clip=1e9, reward_kl_coef=0.0)
    assert_close(got, credit("ppo", spread), 1e-12)


def test_pass_at_k_of_two_captions_is_their_difference() -> None:
    two = toy_batch(valid=torch.tensor([[False, True, True, False]]))
    assert_close(advantages_of("pass_at_k", two), [[0.0, 0.0, 0.4, 0.0]], 1e-12)


def test_ranks_in_the_group_see_no_increasing_map() -> None:
    want = loss_of("infalign_in_group")
    assert loss_of("infalign_in_group", toy_batch((3 * REWARDS).exp())) == pytest.approx(want)
    assert loss_of("infalign_in_group", toy_batch(-REWARDS)) != pytest.approx(want)


def gradient_of(
    name: str, policy: torch.Tensor, batch: GroupBatch | None = None, **overrides: Any
) -> torch.Tensor:
    """Of the loss in each token's log-prob."""
    objective = preset(name, **overrides)
    ready = prepared(objective, batch_of({}) if batch is None else batch)
    logprobs = policy.clone().requires_grad_()
    graph = {"augmented_logprobs": logprobs}
    objective.loss(ready, logprobs, ready.normalizer(), **graph).loss.backward()
    return logprobs.grad


def test_regressions_and_pairs_start_as_reinforce() -> None:
    reinforce = gradient_of("reinforce", OLD, advantage="group_center")
    assert_close(gradient_of("kimi_k15", OLD), reinforce, 1e-12)
    # Sums over pairs of four captions, a group at a time.
    pairs = gradient_of("p3o_pairwise", OLD, reward_kl_coef=0.0)
    assert_close(pairs, reinforce * 4 * 4 / 2, 1e-12)


def test_a_star_po_starts_as_reinforce_with_the_references_soft_value() -> None:
    others = tensor([[0.3, 0.9]])
    batch = batch_of({"reference_rewards": others, "ref_logprobs": OLD})
    value = 0.5 * ((others / 0.5).exp().mean()).log()
    got = gradient_of("a_star_po", OLD, batch)
    want = -2 * 1e-3 / 4 * (REWARDS - value)
    assert_close(got, torch.where(MASK, want[..., None].expand_as(MASK), 0.0), 1e-12)


def test_ipo_is_at_rest_where_scores_differ_by_half_over_beta() -> None:
    # Best is the last caption, worst the first; both have three tokens.
    apart = torch.zeros_like(REF)
    apart[0, 3], apart[0, 0] = 2.5, -2.5
    assert_close(gradient_of("online_ipo", REF + apart), ZEROS, 1e-12)
    assert gradient_of("online_ipo", REF + 0.9 * apart)[0, 3, 0] < 0
    assert gradient_of("online_ipo", REF + 1.1 * apart)[0, 3, 0] > 0


def test_without_a_share_clip_cov_leaves_one_token_out() -> None:
    # The largest (A - mean)(log p - mean) over the eleven tokens, by hand.
    log_p, spread = POLICY[MASK], CENTRED.squeeze()[:, None].expand(4, 3)[MASK[0]]
    left_out = int(((log_p - log_p.mean()) * (spread - spread.mean())).argmax())
    want = gradient_of("grpo_deepseekmath", POLICY, kl_coef=0.0, reducer="token_mean")[MASK]
    assert float(want[left_out].abs()) > 1e-3
    want[left_out] = 0.0
    assert_close(gradient_of("clip_cov", POLICY, covariance_share=0.0)[MASK], want, 1e-12)


def test_an_unchanged_image_teaches_nothing() -> None:
    batch = batch_of({"augmented_ref_logprobs": REF})
    assert_close(gradient_of("pami_changed_image", POLICY, batch), ZEROS, 0.0)


def test_without_an_auxiliary_policy_weights_are_exponential() -> None:
    batch = batch_of({"auxiliary_logprobs": ZEROS[..., None][..., :0]})
    want = -CENTRED.exp()[..., None].expand(1, 4, 3) / 11
    got = gradient_of("two_stage_constrained", OLD, batch)
    assert_close(got, torch.where(MASK, want, 0.0), 1e-12)


def test_centred_log_ratios_of_equal_spread_stay_as_they_are() -> None:
    moved = tensor([[[0.1], [-0.1], [0.1], [-0.1]]]).expand(1, 4, 3)
    batch = batch_of({"mask": LONG})
    want = loss_of("grpo_deepseekmath", batch, OLD + moved, {"kl_coef": 0.0})
    assert loss_of("grpo_guard_ratio_norm", batch, OLD + moved) == pytest.approx(want, abs=1e-12)


def test_entropy_above_its_target_earns_nothing() -> None:
    objective = preset("grpo_adaptive_entropy", entropy_target=1.0)
    state, _ = objective.control(objective.initial_state(), {"objective/entropy": 1.5})
    _, ready = objective.prepare(state, batch_of({}))
    entropy = torch.full_like(ZEROS, 1.5)
    loss = objective.loss(ready, POLICY, ready.normalizer(), entropy=entropy).loss
    assert float(loss) == pytest.approx(loss_of("grpo_deepseekmath", overrides={"kl_coef": 0.0}))


def test_flat_groups_of_copo_learn_from_the_batch() -> None:
    batch = toy_batch(torch.cat([FLAT, 0.4 * FLAT]))
    got = prepared(preset("copo_consistency"), batch).fields["advantages"].sum(1)[..., 0]
    assert_close(got, tensor([[1.0], [-1.0]]).expand(2, 4) * math.sqrt(0.5), 1e-4)
