"""Worked numbers of the policy losses, of tokens and of groups, and of the regularizers."""

from __future__ import annotations

import math

import pytest
import torch
from objectives_toy import (
    EXACT,
    F64,
    LABELS,
    LENGTHS,
    MASK,
    MOVED,
    NORMALIZED,
    OLD,
    POLICY,
    REF,
    REWARDS,
    VALID,
    assert_close,
    loss_of,
    tensor,
    toy_batch,
)

from rayrl.objectives import (
    bounds,
    control,
    group_loss,
    pairs,
    preset,
    ratio,
    regularize,
    scores,
    surrogate,
    weights,
)
from rayrl.objectives.plan import part
from rayrl.objectives.reduce import Normalizer
from rayrl.objectives.stats import masked_mean

DEVIATION = REWARDS - 0.7
TOKENS = MASK.double()
CAPTIONS = torch.ones(1, 4, dtype=F64)
COUNTS = Normalizer(11, 4, 1)
FREE = {"kl_penalty": 0.0}


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def balanced(balance: float) -> tuple[torch.Tensor, torch.Tensor]:
    return bounds.balanced(
        MOVED.exp(),
        NORMALIZED[..., None],
        TOKENS,
        CAPTIONS,
        identity,
        low_range=(0.6, 0.9),
        high_range=(1.2, 3.0),
        bound_step=0.05,
        balance=balance,
    )


def masses(low: torch.Tensor, high: torch.Tensor) -> float:
    effective = torch.where(
        NORMALIZED[..., None] >= 0, MOVED.exp().clamp(max=high), MOVED.exp().clamp(min=low)
    )
    mass = effective * NORMALIZED[..., None] * TOKENS
    return float(mass.clamp(min=0).sum() / -mass.clamp(max=0).sum())


def test_bounds_are_searched_until_the_masses_balance() -> None:
    low, high = balanced(1.0)
    assert_close(torch.stack([low, high]), [0.9, 3.0])
    assert masses(low, high) == pytest.approx(0.9208, abs=5e-5)
    assert masses(tensor(0.6), tensor(1.2)) == pytest.approx(0.8565, abs=5e-5)
    assert_close(torch.stack(balanced(0.0)), [0.6, 1.2])


def test_the_first_bounds_that_balance_are_taken() -> None:
    low, high = balanced(0.87)
    assert masses(low, high) >= 0.87
    assert float(low) == pytest.approx(0.9)
    assert masses(low, high - 0.05) < 0.87


def test_bounds_by_probability() -> None:
    old = tensor([0.01, 0.2, 0.9]).log()
    low, high = bounds.by_probability(old, clip_low=0.16, clip_high=0.2, highest=10.0)
    assert_close(torch.stack([low, high], -1), [[0.5, 5.0], [0.5, 1.6180], [0.7687, 1.1872]])


def test_espo_and_the_metric_that_stops_it() -> None:
    assert_close(loss_of("espo_early_stop", overrides=EXACT), -0.0170)
    objective = preset("espo_early_stop")
    state, ready = objective.prepare(objective.initial_state(), toy_batch())
    total, count = objective.loss(ready, POLICY, ready.normalizer()).metrics[
        "objective/ratio_deviation"
    ]
    assert float(total / count) == pytest.approx(0.19, abs=5e-5)
    for deviation, stop in ((0.19, False), (0.26, True)):
        decisions = objective.control(state, {"objective/ratio_deviation": deviation})[1]
        assert decisions == {"stop_epoch": stop}


def test_disco_with_both_scores_and_without_hard_negatives() -> None:
    assert_close(scores.mean_logprob(POLICY, MASK), [[-1.05, -0.75, -0.75, -0.8167]])
    quiet = {**FREE, "labels": part("above", good_reward=0.8)}
    assert_close(loss_of("disco_log_likelihood", overrides=quiet), -0.1155)
    assert_close(loss_of("disco_ratio", overrides=quiet), -0.0926)
    assert_close(loss_of("disco_b", overrides=quiet), -0.1167)


def test_trust_region_is_silent_while_its_estimate_is_negative() -> None:
    drift = (OLD - POLICY)[MASK].mean()
    assert float(drift) == pytest.approx(-0.0773, abs=5e-5)
    choices = {"kl_limit": 1e-4, "kl_penalty": 1e3}
    silent = regularize.trust_region(POLICY, OLD, TOKENS, CAPTIONS, COUNTS, identity, **choices)
    assert_close(silent, 0.0)
    loud = regularize.trust_region(OLD, POLICY, TOKENS, CAPTIONS, COUNTS, identity, **choices)
    assert_close(loud, 1e3 * (-float(drift) - 1e-4) * -float(drift))


def test_drpo_weighs_good_captions_by_brevity() -> None:
    lengths = torch.tensor([[8, 10, 12, 20]])
    chosen = pairs.shorter_good(LABELS, lengths, VALID, max_tokens=25, brevity_temperature=0.1)
    assert_close(chosen.sum(2), [[0.0, 0.0, 0.9608, 0.0392]])
    mean = scores.mean_logprob(POLICY, MASK)
    assert_close(group_loss.contrastive(mean, chosen, contrast_temperature=10.0), [-0.1463])


def test_pacs_logits_and_loss() -> None:
    moved = scores.over_old(POLICY, OLD, MASK)
    assert_close(moved, [[0.35, -0.05, 0.4, 0.15]])
    losses = group_loss.leave_one_out_bce(moved, LABELS, VALID, beta=1.0)
    psi = tensor([0.1833, -0.35, 0.25, -0.0833])
    want = torch.nn.functional.binary_cross_entropy_with_logits(psi, LABELS[0], reduction="none")
    assert_close(losses[0], want)
    assert_close(losses.mean(), 0.6585)


def test_pacs_weighs_its_classes_alike() -> None:
    labels = tensor([[1.0, 0.0, 0.0, 0.0]])
    losses = group_loss.leave_one_out_bce(torch.zeros_like(labels), labels, VALID, beta=1.0)
    assert_close(losses, tensor([[2.0, 2 / 3, 2 / 3, 2 / 3]]) * math.log(2))


def test_regressions_on_log_ratios() -> None:
    moved = scores.over_old(POLICY, OLD, MASK)
    standard = group_loss.standardized_regression(moved, NORMALIZED, VALID, spread_floor=0.0)
    assert_close(standard.mean(), 2.0737)
    assert_close(loss_of("pmd_mean"), 0.1463)
    linear = group_loss.kimi(POLICY, OLD, MASK, DEVIATION, score_factor=0.1)
    sums = (POLICY * MASK).sum(-1)
    assert_close(linear, -DEVIATION * sums + 0.05 * moved.square())


def test_brain_matches_the_group_to_its_posterior() -> None:
    loss = group_loss.posterior_matching(
        POLICY, OLD, REF, MASK, REWARDS, VALID, posterior_temperature=1.0
    )
    assert_close(loss, [0.0823])
    logprobs = POLICY.clone().requires_grad_()
    group_loss.posterior_matching(
        logprobs, OLD, REF, MASK, REWARDS, VALID, posterior_temperature=1.0
    ).sum().backward()
    # The gradient in each caption's log-prob is beta - alpha.
    assert_close(logprobs.grad[0, :, 0], [0.1324, 0.0150, 0.0095, -0.1568])


def test_opmd_family() -> None:
    assert_close(loss_of("opmd"), -0.0227)
    assert_close(loss_of("opmd_squared"), -0.0410)
    assert_close(loss_of("awm_advantage_weighted", overrides=EXACT), -0.1194)
    assert_close(loss_of("sso", overrides=EXACT), 0.0472)


def test_rec_masks() -> None:
    assert_close(loss_of("rec_one_side"), -0.1177)
    left = weights.one_side(MOVED.exp(), DEVIATION[..., None], 0.8, 1.2)
    assert int(((left == 0) & MASK).sum()) == 2
    ratios, up, down = tensor([0.3, 0.7, 1.0, 1.5, 4.0]), tensor([1.0]), tensor([-1.0])
    assert_close(weights.two_side(ratios, 0.8, 1.2), [0.0, 0.0, 1.0, 0.0, 0.0])
    ring = {"ring_low": 0.6, "ring_high": 2.0}
    assert_close(weights.ring(ratios, up, 0.8, 1.2, **ring), [1.0, 0.0, 1.0, 0.0, 0.0])
    assert_close(weights.ring(ratios, down, 0.8, 1.2, **ring), [0.0, 0.0, 1.0, 0.0, 1.0])


def test_sequence_weights_of_topr_and_vespo() -> None:
    log_ratio = tensor([[[0.2, 0.1], [0.3, -0.5]]])
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    negative = -torch.ones(1, 2, 1, dtype=F64)
    assert_close(weights.tapered(log_ratio, mask, negative), [[[1.0], [math.exp(-0.2)]]])
    assert_close(weights.tapered(log_ratio, mask, -negative), [[[1.0], [1.0]]])
    choices = {"power_positive": 2.0, "decay_positive": 3.0}
    choices |= {"power_negative": 3.0, "decay_negative": 2.0}
    w = math.exp(0.3)
    up = weights.soft_sequence(log_ratio, mask, -negative, **choices)
    down = weights.soft_sequence(log_ratio, mask, negative, **choices)
    assert_close(up[0, 0], [w**2 * math.exp(3 * (1 - w))])
    assert_close(down[0, 0], [w**3 * math.exp(2 * (1 - w))])


def test_ratios_recentred_at_every_position() -> None:
    got = ratio.recentered(POLICY, OLD, MASK, identity).exp()
    assert_close(got[0, 0], [1.1092, 0.8135, 1.2668])


def test_positions_that_no_caption_reaches_do_not_change_the_others() -> None:
    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.zeros_like(x)], -1)

    want = ratio.recentered(POLICY, OLD, MASK, identity)
    got = ratio.recentered(padded(POLICY), padded(OLD), padded(MASK), identity)
    assert_close(got[..., : POLICY.shape[-1]], want)


def test_two_controllers_each_change_their_own_coefficient() -> None:
    choices = {"kl_coef": 0.04, "kl_target": 0.02, "kl_horizon": 10.0}
    choices |= {"entropy_coef": 0.01, "entropy_target": 1.0, "entropy_step": 0.005}
    objective = preset(
        "grpo_adaptive_kl",
        regularizers="kl_k3+entropy_bonus",
        control="adaptive_kl+adaptive_entropy",
        **choices,
    )
    state, _ = objective.control(
        objective.initial_state(), {"objective/kl_k3": 5.0, "objective/entropy": 0.1}
    )
    assert state["coefficients"]["kl_coef"] > 0.04
    assert state["coefficients"]["entropy_coef"] > 0.01


@pytest.mark.parametrize("name", ["sequence", "geometric_mean"])
def test_what_weighs_a_token_of_a_caption_acts_on_that_token(name: str) -> None:
    policy = POLICY.clone().requires_grad_()
    trained = MASK.clone()
    trained[..., 0] = False
    if name == "sequence":
        losses = ratio.sequence(policy, OLD, trained).exp()
    else:
        ones = torch.ones_like(POLICY[..., :1])
        losses = -surrogate.geometric_mean(policy - OLD, ones, trained, log_clip=9.0)
    mean = masked_mean(POLICY - OLD, trained)[..., None].exp()
    assert_close(losses.detach()[trained], mean.expand_as(POLICY)[trained])
    factors = torch.arange(1.0, POLICY.numel() + 1, dtype=F64).view(POLICY.shape) * trained
    (losses * factors).sum().backward()
    assert_close(policy.grad, mean * factors)


def test_a_linear_bound_lies_below_the_ratio() -> None:
    a, moved = tensor([0.5252]), tensor([0.25])
    got = surrogate.linear_bound(moved.exp(), moved, a, 0.8, 1.2)
    assert_close(got, [-0.6565])
    assert float(-got) < 0.5252 * math.exp(0.25)


def test_one_ratio_for_each_segment() -> None:
    segments = torch.tensor([[[0, 0, 1]] * 4])
    got = ratio.segment(POLICY, OLD, MASK, segments).exp()
    assert_close(got[0, 3], [1.0513, 1.0513, 1.0513])
    assert_close(got[0, 2, :2], [math.exp(0.2)] * 2)


def test_length_entropy_and_staleness_factors() -> None:
    assert_close(weights.length(MASK, POLICY)[..., 0], LENGTHS)
    entropy = tensor([[[0.1, 0.9], [0.5, 0.2], [0.3, 7.0]]])
    mask = torch.tensor([[[True, True], [True, True], [True, False]]])
    got = weights.high_entropy(entropy, mask, entropy_share=0.4)
    assert_close(got, [[[0.0, 2.5], [2.5, 0.0], [0.0, 0.0]]])
    # Four tie for two places: all train, and the mean over the tokens stays 1.
    tied = tensor([[[0.5, 0.1]] * 4])
    got = weights.high_entropy(tied, torch.ones_like(tied).bool(), entropy_share=0.25)
    assert_close(got, [[[2.0, 0.0]] * 4])
    got = weights.not_stale_negative(
        OLD - 0.6, OLD, MASK, tensor([[[-1.0], [1.0], [-1.0], [1.0]]]), stale_kl=0.5
    )
    assert_close(got, [[[0.0], [1.0], [0.0], [1.0]]])


def test_the_largest_covariance_of_advantage_and_logprob() -> None:
    logprobs = tensor([[[-1.0, -2.0], [-3.0, -2.0]]])
    advantages = tensor([[[1.0], [-1.0]]])
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    # Deviations 1, 0, -1, 0 times 1, 1, -1, -1: the first and the third token tie.
    got = weights.without_covariance(logprobs, advantages, mask, identity, covariance_share=0.25)
    assert_close(got, [[[0.0, 1.0], [0.0, 1.0]]])
    penalty = regularize.kl_high_covariance(
        logprobs,
        logprobs - 0.1,
        advantages,
        mask,
        identity,
        covariance_share=0.25,
        covariance_kl_coef=2.0,
    )
    assert_close(penalty, [[[0.2, 0.0], [0.2, 0.0]]])


def test_kl_estimators_of_a_log_ratio_of_0_2() -> None:
    p, ref = tensor([0.2, -0.2]), torch.zeros(2, dtype=F64)
    assert_close(regularize.kl_k1(p, ref, kl_coef=1.0), [0.2, -0.2])
    assert_close(regularize.kl_k2(p, ref, kl_coef=1.0), [0.02, 0.02])
    assert_close(regularize.kl_k3(p, ref, kl_coef=1.0), [0.0187, 0.0214])
    assert_close(regularize.kl_k3_straight(p, ref, kl_coef=1.0), [0.0187, 0.0214])


def test_k3_weighted_by_the_ratio() -> None:
    k3 = regularize.kl_k3_weighted(POLICY, OLD, REF, kl_coef=1.0)
    assert_close(k3[MASK].mean(), 0.0126)


def test_entropy_bonus_and_its_controller() -> None:
    p = tensor([0.7, 0.2, 0.1])
    entropy = -(p * p.log()).sum()
    assert_close(entropy, 0.8018)
    assert_close(regularize.entropy_bonus(entropy, entropy_coef=0.01), -0.008018)
    choices = {"entropy_target": 1.0, "entropy_step": 0.005}
    given = {"entropy_coef": 0.01}
    low, state = control.adaptive_entropy({"objective/entropy": 0.9}, given, {}, **choices)
    assert low["coefficients"] == pytest.approx({"entropy_coef": 0.015})
    assert state == pytest.approx({"held": 0.015})
    off, state = control.adaptive_entropy(
        {"objective/entropy": 1.1}, low["coefficients"], state, **choices
    )
    assert off["coefficients"] == {"entropy_coef": 0.0}
    again, _ = control.adaptive_entropy(
        {"objective/entropy": 0.9}, off["coefficients"], state, **choices
    )
    assert again["coefficients"] == pytest.approx({"entropy_coef": 0.015})


def test_a_checkpoint_with_the_held_coefficient_among_the_others_goes_on() -> None:
    objective = preset("grpo_adaptive_entropy")
    before = {"step": 7, "coefficients": {"entropy_coef": 0.0, "entropy_coef_held": 0.02}}
    state, _ = objective.control(before, {"objective/entropy": 0.9})
    assert state["coefficients"]["entropy_coef"] == pytest.approx(0.025)


def test_adaptive_kl_moves_by_a_fifth_at_most() -> None:
    choices = {"kl_target": 0.02, "kl_horizon": 10.0}
    for kl, factor in ((0.02, 1.0), (0.022, 1.01), (5.0, 1.02), (0.0, 0.98)):
        got = control.adaptive_kl({"objective/kl_k3": kl}, {"kl_coef": 0.04}, **choices)
        assert got["coefficients"]["kl_coef"] == pytest.approx(0.04 * factor)


def test_a_controller_changes_the_loss_of_the_next_step() -> None:
    objective = preset("grpo_adaptive_kl")
    state, ready = objective.prepare(objective.initial_state(), toy_batch())
    before = objective.loss(ready, POLICY, ready.normalizer()).metrics["objective/kl_k3"]
    state, _ = objective.control(state, {"objective/kl_k3": 5.0})
    assert state["coefficients"]["kl_coef"] == pytest.approx(0.0408)
    state, ready = objective.prepare(state, toy_batch())
    term = objective.loss(ready, POLICY, ready.normalizer()).metrics["objective/loss_kl_k3"][0]
    assert_close(term, 0.0408 * 0.0113, 1e-5)
    assert_close(before[0] / before[1], 0.0126, 2e-3)


def test_nll_terms() -> None:
    assert_close(0.0205 + regularize.nll_behaviour(tensor(-0.8), nll_coef=0.1), 0.1005)
    anchors = tensor([[[-1.0, -2.0], [-0.6, 0.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    assert_close(regularize.nll_references(anchors, mask, nll_coef=0.5), [0.6])


def test_chi_squared_of_whole_captions() -> None:
    drift = scores.over_reference(POLICY, REF, MASK)
    assert_close(drift.exp(), [[1.2214, 0.9512, 1.3499, 1.0513]])
    got = regularize.chi_squared(
        POLICY,
        REF,
        MASK,
        CAPTIONS,
        COUNTS,
        identity,
        chi_coef=8e-4,
        chi_floor=1e-4,
        chi_limit=10.0,
    )
    assert_close(got, 1.4741e-4, 1e-8)
    assert_close((got / 8e-4).square(), 0.0340)


def test_a_critics_loss() -> None:
    values, old = tensor([[[0.9, 0.2]]]), tensor([[[0.5, 0.2]]])
    choices = {"value_coef": 1.0, "value_clip": 0.2}
    whole = regularize.value_error(
        values, old, tensor([[1.0]]), torch.tensor([[False]]), **choices, finished_only=False
    )
    # The clipped value 0.7 is further from the return 1 than 0.9 is.
    assert_close(whole, [[[0.045, 0.32]]])
    cut = regularize.value_error(
        values, old, tensor([[1.0]]), torch.tensor([[True]]), **choices, finished_only=True
    )
    assert_close(cut, [[[0.0, 0.0]]])
    dense = regularize.value_error(
        values, old, tensor([[[0.3, 0.2]]]), torch.tensor([[False]]), **choices, finished_only=False
    )
    assert_close(dense, [[[0.08, 0.0]]])
