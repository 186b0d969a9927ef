"""Worked numbers of reward aggregation and shaping."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objectives_toy import (
    CLIP,
    CLIP_2,
    EXACT,
    F64,
    FLAT,
    LABELS,
    REWARDS,
    REWARDS_2,
    VALID,
    advantages_of,
    assert_close,
    prepared,
    tensor,
    toy_batch,
)

from rayrl.objectives import (
    advantage,
    aggregate,
    credit,
    history,
    planners,
    preset,
    shaping,
    stats,
    terms,
    token_reward,
)


def test_sum_then_normalise_depends_on_the_scales() -> None:
    batch = toy_batch(terms={"cider_d": REWARDS, "clip_score": CLIP})
    weights = {"cider_d": 0.7, "clip_score": 0.3}
    assert_close(
        aggregate.weighted_sum(batch.terms, term_weights=weights), [[0.38, 0.53, 0.84, 0.99]]
    )
    got = advantages_of("mo_grpo", batch, term_weights=weights, **EXACT)
    assert_close(got, [[-1.2608, -0.6407, 0.6407, 1.2608]])
    assert_close(advantages_of("mo_grpo", batch, **EXACT), [[-1.1508, -0.8220, 0.8220, 1.1508]])


def test_gdpo_normalises_each_term_and_then_the_batch() -> None:
    both = {
        "cider_d": torch.cat([REWARDS, REWARDS_2]),
        "clip_score": torch.cat([CLIP, CLIP_2]),
    }
    first = advantage.normalize_each(both, term_weights={}, eps=0.0, ddof=0)
    assert_close(first, [[0.0286, -0.9724, 0.9724, -0.0286], [-2.0, 0.0, 0.0, 2.0]])
    batch = toy_batch(both["cider_d"], terms=both)
    got = advantages_of("gdpo", batch, **EXACT, batch_eps=0.0)
    assert_close(got, [[0.0257, -0.8745, 0.8745, -0.0257], [-1.7985, 0.0, 0.0, 1.7985]])


def test_ensembles_flip_the_ranking_of_a_disputed_caption() -> None:
    scores = {"a": tensor([[1.0, 0.7]]), "b": tensor([[0.9, 0.6]]), "c": tensor([[0.2, 0.65]])}
    assert_close(aggregate.weighted_sum(scores, term_weights={}) / 3, [[0.7, 0.65]])
    assert_close(aggregate.worst_of(scores), [[0.2, 0.6]])
    assert_close(aggregate.mean_minus_variance(scores, uncertainty=0.5), [[0.6050, 0.6487]])


def test_constrained_grpo_in_both_readings_and_its_dual_step() -> None:
    costs = {"cider_d": REWARDS, "too_long": tensor([[0.0, 1.0, 0.0, 1.0]])}
    batch = toy_batch(terms=costs)
    choices = {"limits": {"too_long": 0.2}, "multiplier_start": 0.5}
    objective = preset("constrained_grpo", **choices)
    state, ready = objective.prepare(objective.initial_state(), batch)
    assert_close(ready.fields["advantages"][:, 0, :, 0], [[-0.8131, -1.0252, 1.0252, 0.8131]], 1e-4)
    assert state["advantage lagrangian"] == pytest.approx({"too_long": 0.53})
    combined = advantages_of("constrained_grpo", batch, **choices, per_component=False)
    assert_close(combined, [[-0.6868, -1.2362, 1.2362, 0.6868]], 1e-4)


def test_constrained_grpo_names_the_costs_it_knows() -> None:
    with pytest.raises(ValueError, match="no cost 'too_lng', the batch has cider_d, truncated"):
        prepared(preset("constrained_grpo", limits={"too_lng": 0.1}), toy_batch())


def test_one_shot_multiplier_meets_its_constraint() -> None:
    g = tensor([[1.0, 0.0, 1.0, 0.0]])
    (multiplier,) = planners.optimal_multipliers(
        REWARDS.numpy(), g.numpy()[..., None], [0.7], temperature=0.5
    )
    assert multiplier == pytest.approx(0.7236, abs=1e-4)
    weights = torch.softmax((REWARDS + multiplier * g) / 0.5, 1)
    assert_close((weights * g).sum(), 0.7, 1e-4)
    got = aggregate.with_multipliers(REWARDS, {"g": g}, multipliers={"g": multiplier})
    assert_close(got, [[0.9236, 0.5, 1.6236, 1.2]], 1e-4)


def test_one_shot_multipliers_of_constraints_that_hold_and_that_cannot() -> None:
    g = [[[1.0], [0.0], [1.0], [0.0]]]
    held = planners.optimal_multipliers(REWARDS.numpy(), g, [0.1], temperature=0.5)
    assert held.tolist() == [0.0]
    with pytest.raises(ValueError, match="can the constraints be met"):
        planners.optimal_multipliers(REWARDS.numpy(), g, [1.5], temperature=0.5)


def test_calibrated_rewards_against_reference_captions() -> None:
    references = tensor([[0.3, 0.4, 0.6, 0.7, 1.0]])
    quantile = shaping.quantile_in_reference(REWARDS, references)
    assert_close(quantile, [[0.0, 0.4, 0.8, 1.0]])
    assert_close(shaping.exponential_tilt(quantile, tilt=4.0), [[1.0, 4.9530, 24.5325, 54.5982]])
    batch = toy_batch(reference_rewards=references)
    got = advantages_of("infalign_ctrl", batch, **EXACT)
    assert_close(got, [[-0.9560, -0.7695, 0.1538, 1.5717]])


def test_cgpo_factors() -> None:
    calibrated = shaping.sigmoid_over_greedy(REWARDS, tensor([0.6]))
    assert_close(calibrated, [[0.4013, 0.4750, 0.5744, 0.6457]])
    judged = aggregate.judged(calibrated, torch.tensor([[True, True, False, True]]))
    drift = tensor([[[0.05], [0.2], [0.1], [0.3]]])
    one = torch.ones(1, 4, 1, dtype=torch.bool)
    bounded = shaping.kl_bounded(judged, drift, torch.zeros_like(drift), one, kl_max=0.5)
    assert_close(bounded, [[0.3612, 0.2850, 0.0, 0.2583]])
    assert_close(advantage.center_batch(bounded), [[0.1351, 0.0589, -0.2261, 0.0321]])


def test_confidence_calibration_and_its_running_mean() -> None:
    got = terms.calibrated(tensor([0.2, 1.2]), tensor([0.8, 0.8]), 0.7)
    assert_close(got, [0.14, 1.56])
    ones = torch.ones(1, 4, 1, dtype=torch.bool)
    _, state = shaping.by_confidence(
        REWARDS, torch.zeros(1, 4, 1, dtype=F64), ones, VALID, {"mean": 0.5}, average_rate=0.1
    )
    assert state["mean"] == pytest.approx(0.52)


def test_win_rates() -> None:
    assert_close(shaping.win_rate(REWARDS), [[0.0, 0.3333, 0.6667, 1.0]])
    got = advantages_of("pref_grpo_win_rate", toy_batch(), **EXACT)
    assert_close(got, [[-1.3416, -0.4472, 0.4472, 1.3416]])


def test_ties_stop_win_rates_from_inflating_a_near_tied_group() -> None:
    near = tensor([[1.000, 1.001, 1.002, 1.003]])
    inflated = advantages_of("pref_grpo_win_rate", toy_batch(near), **EXACT)
    assert_close(inflated, [[-1.3416, -0.4472, 0.4472, 1.3416]])
    tied = advantages_of("pref_grpo_win_rate", toy_batch(near), **EXACT, tie_margin=0.01)
    assert_close(tied, [[0.0, 0.0, 0.0, 0.0]])


def test_clip_reward_against_the_greedy_caption() -> None:
    def reward(cosine: float, grammar: float) -> torch.Tensor:
        return 2 * 2.5 * tensor([[cosine]]) + grammar

    got = advantage.greedy_baseline(reward(0.30, 0.90), reward(0.28, 0.95)[0])
    assert_close(got, [[0.05]])


def test_products_and_harmonic_means_of_terms() -> None:
    factors = {"cider_d": tensor([[1.2, 3.0]]), "length": tensor([[0.9, 1.0]])}
    factors["objects"] = tensor([[0.5, 0.0]])
    assert_close(aggregate.product(factors, main_term="cider_d"), [[0.54, 0.0]])
    two = {"cider_d": tensor([[0.9, -1.0]]), "clip_score": tensor([[0.5, 0.5]])}
    got = aggregate.harmonic_mean(two, main_term="cider_d", main_share=0.5)
    assert_close(got, [[0.6429, 0.0]])


def test_product_refuses_a_factor_above_one() -> None:
    with pytest.raises(ValueError, match=r"term clip_score has values outside of \[0, 1\]"):
        aggregate.product({"a": REWARDS, "clip_score": 2 * CLIP}, main_term="a")


def test_token_rewards_of_a_guide() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.bool)

    def reward(guide: float, old: float, ref: float, guide_kl: float) -> torch.Tensor:
        return token_reward.guided(
            torch.zeros(1, 1, dtype=F64),
            tensor([[[guide]]]),
            tensor([[[old]]]),
            tensor([[[ref]]]),
            one,
            guide_weight=0.05,
            guide_cap=0.05,
            guide_kl=guide_kl,
            outcome_weight=1.0,
            outcome_cap=10.0,
        )

    assert_close(reward(0.3, 0.0, -0.1, 0.0), [[[0.02]]])
    assert_close(reward(0.3, 0.2, 0.0, 0.01), [[[0.013]]])
    assert_close(reward(3.0, 0.0, 0.0, 0.0), [[[0.05]]])


def test_wrong_phrases_cost_their_tokens() -> None:
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    wrong = tensor([[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    rewards = token_reward.wrong_spans(
        tensor([[1.0, 0.0]]), wrong, mask, outcome_weight=2.0, span_penalty=1.0
    )
    assert_close(rewards, [[[2.0, 2.0, 1.0], [0.0, -1.0, 0.0]]])
    got = credit.normalize_tokens(rewards, mask, eps=0.0)
    assert_close(got, [[[1.2060, 1.2060, 0.3015], [-0.6030, -1.5076, -0.6030]]])


def test_information_gain_of_two_segments_and_the_outcome() -> None:
    values = tensor([[[0.0, 0.1, 0.4, 9.0], [0.0, 0.2, 0.2, 9.0]]])
    segments = torch.arange(3).expand(1, 2, 3)
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    got = credit.information_gain(
        tensor([[1.0, 0.5]]), values, segments, mask, segment_discount=1.0, eps=0.0
    )
    assert_close(got, [[[1.8944, 2.3416, 1.0], [-1.8944, -2.3416, -1.0]]])


def test_efficiency_of_a_cost() -> None:
    cost, best = tensor([3.0, 3.0, 2.0, 0.0]), tensor([0.0, 2.0, 2.0, 0.0])
    assert_close(terms.efficiency(cost, best, smoothing=4.0), [0.5878, 0.9511, 1.0, 1.0])


def test_brevity_compares_with_the_shortest_good_caption() -> None:
    lengths = torch.tensor([[2, 9, 2, 3]])
    got = shaping.brevity(REWARDS, lengths, LABELS, VALID, efficiency_scale=1.0)
    factor = math.sin(2 * 2 * 3 / 5 * math.pi / 4)
    assert_close(got[0, 2:], [0.9, 1.2 * factor])
    bad = torch.zeros_like(LABELS)
    assert_close(shaping.brevity(REWARDS, lengths, bad, VALID, efficiency_scale=1.0), REWARDS)


def test_length_counts_once_a_group_is_good() -> None:
    lengths = torch.tensor([[8, 10, 12, 20], [8, 10, 12, 20]])
    labels = torch.cat([LABELS, torch.zeros_like(LABELS)])
    got = shaping.shorten_good_groups(
        labels, lengths, labels, VALID.expand(2, 4), length_weight=0.2, good_share=0.5
    )
    assert_close(got, [[0.0, 0.0, 0.9462, 0.8538], [0.0, 0.0, 0.0, 0.0]])
    none = shaping.shorten_good_groups(
        labels, lengths, labels, VALID.expand(2, 4), length_weight=0.2, good_share=0.0
    )
    assert_close(none, labels)


def test_a_reward_model_as_the_only_term() -> None:
    scores = {"cider_d": tensor([[0.0, 5.0]]), "reward_model": tensor([[1.2, 0.9]])}
    assert_close(
        stats.standardize(aggregate.only_term(scores, main_term="reward_model")), [[1.0, -1.0]]
    )


def test_a_group_scored_by_two_reward_versions_is_dropped() -> None:
    versions = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 2]])
    batch = toy_batch(torch.cat([REWARDS, tensor([[0.6, 0.4, 0.4, 0.4]])]))
    ready = prepared(preset("mpo_meta_policy"), replace(batch, reward_versions=versions))
    assert_close(ready.fields["caption_weights"], [[1.0] * 4, [0.0] * 4])
    assert ready.normalizer().captions == 4


def test_self_cider_of_orthogonal_and_identical_captions() -> None:
    orthogonal = torch.eye(4, dtype=F64)
    assert_close(
        terms.self_cider(torch.stack([orthogonal, torch.ones_like(orthogonal)])), [1.0, 0.0]
    )


def test_diversity_bonus_goes_to_the_caption_that_differs() -> None:
    same = torch.ones(3, 3, dtype=F64)
    same[2, :2] = same[:2, 2] = 0.0
    bonus = shaping.diversity_bonus(torch.zeros(1, 3, dtype=F64), same[None], diversity_coef=1.0)
    whole = float(terms.self_cider(same))
    # Eigenvalues 2, 1, 0 give -log(sqrt 2 / (1 + sqrt 2)) / log 3.
    assert whole == pytest.approx(math.log((1 + math.sqrt(2)) / math.sqrt(2)) / math.log(3))
    assert_close(bonus, [[whole - 1.0, whole - 1.0, whole]])
    # A place without a caption changes nothing.
    padded = torch.ones(1, 4, 4, dtype=F64)
    padded[0, :3, :3] = same
    valid = torch.tensor([[True, True, True, False]])
    again = shaping.diversity_bonus(torch.zeros(1, 4, dtype=F64), padded, valid, diversity_coef=1.0)
    assert_close(again[:, :3], bonus)
    assert float(again[0, 3]) == 0.0


def test_rewards_normalised_by_all_batches_before() -> None:
    first = tensor([[0.4, 0.6, 0.8, 1.0]])
    _, state = shaping.history_normalized(first, VALID, {}, reward_clip=1.5)
    got, state = shaping.history_normalized(REWARDS, VALID, state, reward_clip=1.5)
    assert_close(got, [[-1.5, -0.8944, 0.8944, 1.5]])
    both = torch.cat([first, REWARDS])
    assert state["count"] == 8
    assert state["mean"] == pytest.approx(float(both.mean()))
    assert state["variance"] == pytest.approx(float(both.var(correction=0)))


def test_chi_squared_in_the_reward() -> None:
    old, ref = tensor([[[0.2], [-0.2]]]), torch.zeros(1, 2, 1, dtype=F64)
    mask, valid = torch.ones(1, 2, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    zeros = torch.zeros(1, 2, dtype=F64)
    got = shaping.chi_squared_penalty(zeros, old, ref, mask, valid, reward_chi_coef=1.0)
    root = math.sqrt(2 * math.cosh(0.2) - 2)
    assert_close(got, [[-math.exp(0.2) / root, -math.exp(-0.2) / root]])


def test_lambda_multiplier_never_falls_below_zero() -> None:
    _, state = history.lagrangian(
        FLAT,
        torch.zeros(1, 4, dtype=torch.bool),
        {"truncated": 0.01},
        limits={"truncated": 0.5},
        multiplier_start=0.0,
        multiplier_lr=0.1,
        per_component=True,
    )
    assert state == {"truncated": 0.0}
