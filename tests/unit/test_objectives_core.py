"""Worked numbers of the general objectives, through whole plans and through single parts.

The small group of ``objectives_toy`` has rewards 0.2, 0.5, 0.9, 1.2; standard deviations are those
of the population and epsilons 0 unless said."""

from __future__ import annotations

import pytest
import torch
from objectives_toy import (
    CLIP,
    EXACT,
    FLAT,
    LENGTHS,
    MASK,
    MOVED,
    NORMALIZED,
    OLD,
    POLICY,
    REF,
    REWARDS,
    advantages_of,
    assert_close,
    loss_of,
    tensor,
    toy_batch,
)

from rayrl.objectives import (
    advantage,
    credit,
    mismatch,
    reduce,
    regularize,
    shaping,
    stats,
    surrogate,
)
from rayrl.objectives.reduce import Normalizer


def test_group_advantages_with_both_standard_deviations() -> None:
    assert_close(advantage.group_normalize(REWARDS, eps=0.0), [[-1.3131, -0.5252, 0.5252, 1.3131]])
    assert_close(
        advantage.group_normalize(REWARDS, eps=0.0, ddof=1), [[-1.1371, -0.4549, 0.4549, 1.1371]]
    )
    assert_close(advantage.group_normalize(REWARDS, eps=1e-5), [[-1.3130, -0.5252, 0.5252, 1.3130]])


def test_grpo_as_first_published() -> None:
    assert_close(loss_of("grpo_deepseekmath", overrides={**EXACT, "kl_coef": 0.0}), 0.0205)
    assert_close(loss_of("grpo_deepseekmath", overrides=EXACT), 0.0209)


def test_mean_k3_of_the_captions() -> None:
    k3 = regularize.kl_k3(POLICY, REF, kl_coef=1.0)
    weights = MASK.double()
    ones = torch.ones(1, 4, dtype=torch.float64)
    assert_close(reduce.sequence_mean_token_mean(k3, weights, ones, Normalizer(11, 4, 1)), 0.0113)


def test_grpo_of_the_captioning_paper() -> None:
    assert_close(loss_of("grpo"), 0.0792)


def test_reinforce_without_baseline() -> None:
    assert_close(loss_of("reinforce"), 1.5112)


def test_scst_and_remax_against_a_greedy_caption_of_reward_0_6() -> None:
    batch = toy_batch(greedy_rewards=tensor([0.6]))
    assert_close(advantages_of("scst", batch), [[-0.4, -0.1, 0.3, 0.6]])
    assert_close(loss_of("scst", batch), 0.0395)
    assert_close(loss_of("remax", batch), 0.1088)


def test_leave_one_out_is_g_over_g_minus_1_times_the_deviation() -> None:
    assert_close(advantages_of("nsc", toy_batch()), [[-0.6667, -0.2667, 0.2667, 0.6667]])
    assert_close(advantages_of("nsc", toy_batch()) * 3 / 4, [[-0.5, -0.2, 0.2, 0.5]])
    assert_close(loss_of("nsc"), -0.0606)


def test_rloo_with_the_kl_in_the_reward() -> None:
    # The KL of the reward is that of the samples, so the policy here is the old one.
    batch = toy_batch(old_logprobs=POLICY)
    shaped = shaping.kl_penalty(REWARDS, POLICY, REF, MASK, reward_kl_coef=0.1)
    assert_close(shaped, [[0.18, 0.505, 0.87, 1.195]])
    assert_close(
        advantages_of("rloo", batch, reward_kl_coef=0.1),
        [[-0.6767, -0.2433, 0.2433, 0.6767]],
    )


def test_kl_in_the_reward_of_the_old_policy() -> None:
    shaped = shaping.kl_penalty(REWARDS, OLD, REF, MASK, reward_kl_coef=0.04)
    assert_close(shaped, [[0.2060, 0.5, 0.9040, 1.2040]])


def test_reinforce_plus_plus_whitens_over_the_batch() -> None:
    batch = toy_batch(torch.cat([REWARDS, FLAT]), mask=torch.ones(2, 4, 3, dtype=torch.bool))
    plain = advantages_of("reinforce_plus_plus", batch, eps=0.0)
    assert_close(plain[0, :, 0], [-2.1089, -1.1355, 0.1622, 1.1355])
    assert_close(plain[1], torch.full((4, 3), 0.4867))
    baseline = advantages_of("reinforce_plus_plus_baseline", batch, eps=0.0)
    assert_close(baseline, [[-1.8570, -0.7428, 0.7428, 1.8570], [0.0, 0.0, 0.0, 0.0]])


def test_dr_grpo_divides_by_a_constant_length() -> None:
    assert_close(advantages_of("dr_grpo", toy_batch()), [[-0.5, -0.2, 0.2, 0.5]])
    assert_close(loss_of("dr_grpo", overrides={"max_tokens": 4}), 0.0206)


def test_dapo() -> None:
    plain = {**EXACT, "overlong_coef": 0.0}
    assert_close(loss_of("dapo", overrides=plain), 0.0654)
    lengths = torch.tensor([[15, 18, 20, 23]])
    punished = shaping.overlong_penalty(
        torch.zeros(1, 4), lengths, overlong_coef=1.0, max_tokens=20, grace_tokens=4
    )
    assert_close(punished, [[0.0, -0.5, -1.0, -1.0]])


def test_gspo_with_the_papers_and_with_wide_bounds() -> None:
    assert_close(torch.exp((MOVED * MASK).sum(-1) / LENGTHS), [[1.1237, 0.9835, 1.2214, 1.0513]])
    assert_close(loss_of("gspo", overrides=EXACT), 0.0404)
    assert_close(loss_of("gspo", overrides={**EXACT, "clip_low": 0.2, "clip_high": 0.2}), -0.0046)


def test_cispo_with_a_cap_of_1_2() -> None:
    assert_close(loss_of("cispo", overrides={**EXACT, "clip_high": 0.2}), -0.1785)


def test_gmpo_with_no_ratio_beyond_its_bound() -> None:
    assert_close(loss_of("gmpo", overrides=EXACT), -0.0075)


def test_dual_and_two_sided_clip_of_a_huge_ratio_with_a_negative_advantage() -> None:
    ratio, a = tensor([5.0]), tensor([-1.0])
    assert_close(surrogate.min_clip(ratio, a, 0.8, 1.2), [5.0])
    assert_close(surrogate.min_clip(ratio, a, 0.8, 1.2, dual_clip=3.0), [3.0])
    assert_close(surrogate.min_clip(ratio, a, 0.8, 1.2, ratio_cap=4.0), [4.0])


def test_mismatch_factors() -> None:
    old, rollout = tensor([[[0.4, 1.1, 3.0]]]).log(), torch.zeros(1, 1, 3, dtype=torch.float64)
    mask = torch.ones(1, 1, 3, dtype=torch.bool)
    assert_close(mismatch.token_truncated(old, rollout, is_cap=2.0), [[[0.4, 1.1, 2.0]]])
    assert_close(mismatch.token_masked(old, rollout, is_low=0.5, is_high=2.0), [[[0.0, 1.1, 0.0]]])
    assert_close(mismatch.sequence_truncated(old, rollout, mask, is_cap=2.0), [[[1.32]]])
    assert_close(mismatch.sequence_masked(old, rollout, mask, is_low=0.5, is_high=1.3), [[[0.0]]])
    # The geometric mean of the three is 1.0970.
    kept = mismatch.geometric_masked(old, rollout, mask, is_low=1.09, is_high=1.10)
    dropped = mismatch.geometric_masked(old, rollout, mask, is_low=0.999, is_high=1.001)
    assert_close(kept, [[[1.0]]])
    assert_close(dropped, [[[0.0]]])


def test_reducers_of_two_captions() -> None:
    losses = tensor([[[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]])
    tokens = tensor([[[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]])
    captions, counts = torch.ones(1, 2, dtype=torch.float64), Normalizer(4, 2, 1)
    assert_close(reduce.token_mean(losses, tokens, captions, counts), 2.0)
    assert_close(reduce.sequence_mean_token_mean(losses, tokens, captions, counts), 3.0)
    assert_close(reduce.sequence_mean_token_sum(losses, tokens, captions, counts), 4.0)
    assert_close(reduce.constant_length(losses, tokens, captions, counts, max_tokens=4), 1.0)
    assert_close(reduce.sequence_sum_token_mean(losses, tokens, captions), 6.0)


def test_sapo() -> None:
    assert_close(loss_of("sapo", overrides=EXACT), -0.0601)


def test_further_baselines() -> None:
    n = LENGTHS
    assert_close(advantage.length_weighted_baseline(REWARDS, n), REWARDS - 7.5 / 11)
    assert_close(advantage.best_over_second(REWARDS), [[0.0, 0.0, 0.0, 0.3]])
    assert_close(advantage.relative_to_mean(REWARDS), (REWARDS - 0.7) / 0.7)
    assert_close(advantage.nonzero_scaled(tensor([[0.0, 1.0, 0.0, 1.0]])), [[-1.0, 1.0, -1.0, 1.0]])
    references = tensor([[0.3, 0.7]])
    value = 0.5 * torch.log((torch.exp(tensor(0.6)) + torch.exp(tensor(1.4))) / 2)
    got = advantage.reference_value_baseline(REWARDS, references, value_temperature=0.5)
    assert_close(got, REWARDS - value)


def test_lite_ppo_divides_by_the_spread_of_the_batch() -> None:
    both = torch.cat([REWARDS, FLAT])
    got = advantages_of("lite_ppo", toy_batch(both), eps=0.0)
    assert_close(got, (both - both.mean(1, keepdim=True)) / both.std(correction=0))


def test_token_baseline_of_least_variance() -> None:
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    old = tensor([[[0.5], [0.25]]]).log()
    collision = tensor([[[0.5], [0.5]]])
    # Energies 1 - 2 p + 0.5 are 0.5 and 1.0, so the baseline is (0.5 * 1 + 1.0 * 4) / 1.5 = 3.
    got = credit.token_baseline(tensor([[1.0, 4.0]]), old, collision, mask)
    assert_close(got, [[[-2.0], [1.0]]])


def test_token_baseline_where_all_captions_take_the_same_certain_token() -> None:
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    old = torch.tensor([[[-1e-8], [-1e-8]]])
    got = credit.token_baseline(torch.tensor([[0.9, 1.1]]), old, torch.ones(1, 2, 1), mask)
    assert got.flatten().tolist() == pytest.approx([-0.1, 0.1], abs=1e-6)


def test_a_flat_batch_is_not_whitened_into_advantages() -> None:
    rewards = torch.full((32, 8), 0.7)
    assert not stats.whiten(rewards, eps=1e-8).any()
    assert not stats.whiten(rewards, torch.zeros_like(rewards)).any()


def test_single_formulas_of_neighbours() -> None:
    ratio, a = tensor([1.5]), tensor([2.0])
    assert_close(surrogate.ratio_variance(ratio, a, penalty=0.04), [-(3.0 - 0.04 * 0.25)])
    assert_close(surrogate.clipped_weight(tensor([-1.0]), ratio, a, 0.0, 1.2), [2.4])
    both = advantage.normalize_each({"a": REWARDS, "b": CLIP}, term_weights={}, eps=0.0, ddof=0)
    assert_close(both, NORMALIZED + (CLIP - 0.65) / CLIP.std(correction=0))
