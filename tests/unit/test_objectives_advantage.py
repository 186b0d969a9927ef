"""Worked numbers of the advantage estimators, those with a memory, on trees and with critics."""

from __future__ import annotations

import math

import pytest
import torch
from objectives_toy import (
    F64,
    FLAT,
    NORMALIZED,
    REWARDS,
    VALID,
    advantages_of,
    assert_close,
    prepared,
    tensor,
    toy_batch,
)

from rayrl.objectives import advantage, credit, history, preset, segments, surrogate
from rayrl.objectives.tokens import prefix_tree_values

NOISE = {"process_noise": 1e-5, "measurement_noise": 1e-2}
# a dog runs / a dog sits / a cat sits / the cat sits
CAPTIONS = torch.tensor([[[1, 2, 3], [1, 2, 4], [1, 5, 4], [6, 5, 4]]])
ONES = torch.ones(1, 4, 3, dtype=torch.bool)


def test_kalman_filter_within_the_group() -> None:
    got, state = history.kalman(REWARDS, {}, scope="group", **NOISE)
    assert_close(got, [[0.0199, 2.1497, 6.3806, 10.0127]], 1e-4)
    assert state == {}


def test_kalman_filter_over_the_batches_means() -> None:
    first, state = history.kalman(FLAT, {}, scope="stream", **NOISE)
    gain = 1.00001 / 1.01001
    assert state["x"] == pytest.approx(gain)
    assert state["variance"] == pytest.approx((1 - gain) * 1.00001)
    assert_close(first, (FLAT - gain) / math.sqrt((1 - gain) * 1.00001))
    _, later = history.kalman(FLAT, state, scope="stream", **NOISE)
    assert gain < later["x"] < 1.0


def test_kalman_skips_captions_that_do_not_exist() -> None:
    valid = torch.tensor([[True, True, False, True]])
    got, _ = history.kalman(REWARDS, {}, valid, scope="group", **NOISE)
    want, _ = history.kalman(REWARDS[:, [0, 1, 3]], {}, scope="group", **NOISE)
    assert_close(got[:, [0, 1, 3]], want)
    assert float(got[0, 2]) == 0.0


def test_kalman_refuses_another_scope() -> None:
    with pytest.raises(ValueError, match="scope 'batch': want 'group' or 'stream'"):
        history.kalman(REWARDS, {}, scope="batch", **NOISE)


def test_a_virtual_best_caption() -> None:
    zeros = torch.zeros_like(REWARDS)
    assert_close(advantage.virtual_best(zeros, best_reward=1.0), [[-0.4472] * 4])
    got = advantage.virtual_best(REWARDS, best_reward=1.5)
    assert_close(got, [[-1.2632, -0.6890, 0.0766, 0.6507]])


def test_a_group_better_than_the_virtual_best_uses_its_own_best() -> None:
    got = advantage.virtual_best(REWARDS, best_reward=1.0, eps=0.0)
    five = torch.cat([REWARDS, tensor([[1.2]])], 1)
    assert_close(got, ((five - five.mean()) / five.std())[:, :4])


def test_smoothed_advantages_merge_a_group_with_what_was_seen_of_its_image() -> None:
    state = {"image 0": [1, 0.5, 0.3]}
    got, new = history.smoothed(REWARDS, ("image 0",), state, eps=0.0)
    assert_close(got, [[-1.0821, -0.3558, 0.6126, 1.3389]])
    assert new["image 0"] == pytest.approx([2, 0.6, 0.3894], abs=1e-4)


def test_smoothed_advantages_of_a_flat_group_with_a_history() -> None:
    state = {"a": [3, 0.7, 0.3]}
    got, new = history.smoothed(FLAT, ("a",), state, eps=0.0)
    assert_close(got, [[0.1936] * 4])
    assert new["a"] == pytest.approx([4, 0.7750, 0.2905], abs=1e-4)


def test_smoothed_advantages_of_a_first_visit_are_those_of_grpo() -> None:
    got, _ = history.smoothed(REWARDS, ("a",), {}, eps=0.0)
    assert_close(got, advantage.group_normalize(REWARDS, eps=0.0, ddof=1), 1e-12)


def test_global_advantages_blend_in_where_outcomes_are_few() -> None:
    # Means 0.7, 1.0, 0.4 of flat groups (entropy 0) give global advantages 0, 1, -1.
    rewards = torch.cat([0.7 * FLAT, FLAT, 0.4 * FLAT])
    local, world = advantage.local_and_global(
        rewards, outcome_width=0.1, blend_slope=20.0, blend_entropy=0.5, eps=0.0
    )
    assert_close(local[..., 0], torch.zeros(3, 4))
    assert_close(world[..., 0], [[0.0] * 4, [1.0] * 4, [-1.0] * 4])


def test_local_advantages_rule_where_outcomes_are_many() -> None:
    # Two of four captions share an outcome: H = 1.5 bits, weight sigmoid(20) = 1.0000, and the
    # group counts with 0.7 (1 - 0.375 * 1.5) = 0.3062 among the groups.
    rewards = torch.cat([tensor([[0.3, 0.3, 0.9, 1.3]]), 0.3062 * FLAT, 0.0 * FLAT])
    local, world = advantage.local_and_global(
        rewards, outcome_width=0.1, blend_slope=20.0, blend_entropy=0.5, eps=0.0
    )
    first = rewards[:1]
    assert_close(local[0, :, 0], ((first - first.mean()) / first.std())[0])
    group = tensor([0.30625, 0.3062, 0.0])
    want = (group - group.mean()) / group.std()
    assert_close(world[1, :, 0], want[1].expand(4))
    assert_close(world[0, :, 0], torch.zeros(4))


def test_room_for_captions_that_a_group_does_not_have_changes_no_blend() -> None:
    rewards = tensor([[0.3, 0.3, 0.9, 1.3], [0.1, 0.4, 0.4, 0.4], [0.5, 0.5, 0.2, 0.2]])
    options = {"outcome_width": 0.1, "blend_slope": 2.0, "blend_entropy": 1.0}
    want = advantage.local_and_global(rewards, **options)
    wide = torch.cat([rewards, torch.full((3, 8), 9.0, dtype=rewards.dtype)], 1)
    valid = torch.arange(12) < 4
    got = advantage.local_and_global(wide, valid.expand(3, 12), **options)
    assert_close(got[:, :, :4], want)


def test_values_and_credit_of_a_prefix_tree() -> None:
    values = prefix_tree_values(REWARDS, CAPTIONS, ONES, VALID)
    want = [
        [0.7000, 0.5333, 0.3500, 0.2000],
        [0.7000, 0.5333, 0.3500, 0.5000],
        [0.7000, 0.5333, 0.9000, 0.9000],
        [0.7000, 1.2000, 1.2000, 1.2000],
    ]
    assert_close(values, [want])
    got = credit.prefix_tree(REWARDS, CAPTIONS, ONES, VALID, eps=0.0)
    want = [
        [-1.7508, -1.7945, -1.7070],
        [-0.9629, -1.0067, -0.1313],
        [0.0875, 1.4881, 0.5252],
        [2.6261, 1.3131, 1.3131],
    ]
    assert_close(got, [want])


def test_a_shorter_caption_shares_only_the_prefix_that_it_has() -> None:
    mask = torch.tensor([[[True, True], [True, False]]])
    tokens = torch.tensor([[[1, 0], [1, 0]]])
    values = prefix_tree_values(tensor([[1.0, 3.0]]), tokens, mask, VALID[:, :2])
    assert_close(values[0, 0], [2.0, 2.0, 1.0])
    assert_close(values[0, 1, :2], [2.0, 2.0])


def test_segment_advantages_are_differences_of_values() -> None:
    # Before the first token the value is the group's mean, 0.6, whatever is given there.
    values = tensor([[[0.0, 0.0, 0.8, 0.5, 0.0]] * 2])
    parts = torch.tensor([[[0, 0, 1, 2]] * 2])
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    got = credit.segment_gain(tensor([[0.9, 0.3]]), values, parts, mask)
    assert_close(got[0, 0], [0.2, 0.2, -0.3, 0.4])
    assert_close(got[0, 1], [0.2, 0.2, -0.3, -0.2])


def test_one_segment_that_starts_with_the_groups_mean_gives_the_deviation() -> None:
    whole = torch.zeros(1, 4, 3, dtype=torch.long)
    got = credit.segment_gain_in_tree(REWARDS, CAPTIONS, whole, ONES, VALID)
    assert_close(got, (REWARDS - 0.7)[..., None].expand(1, 4, 3))


def test_segments_by_length_and_at_improbable_tokens() -> None:
    mask = torch.tensor([[[True] * 5 + [False]]])
    assert_close(segments.fixed_length(mask, segment_length=2), [[[0, 0, 1, 1, 2, 0]]])
    old = tensor([[[0.5, 0.95, 0.5, 0.5, 0.99, 0.1]]]).log()
    got = segments.at_improbable(old, mask, cut_probability=0.9, cut_every=1)
    assert_close(got, [[[0, 0, 1, 2, 2, 0]]])
    got = segments.at_improbable(old, mask, cut_probability=0.9, cut_every=2)
    assert_close(got, [[[0, 0, 1, 1, 1, 0]]])


def test_novelty_raises_unlikely_good_captions_only() -> None:
    mean_logprob = tensor([[[-1.2], [-0.6], [-0.9], [-1.5]]])
    mask = torch.ones(1, 4, 1, dtype=torch.bool)
    got = advantage.favour_novel(NORMALIZED, mean_logprob, mask, novelty=1.0, novelty_cap=1.0)
    assert_close(got, [[-1.3131, -0.5252, 0.5252, 1.6754]])


def test_a_baseline_below_the_mean() -> None:
    assert_close(advantages_of("asymre_shifted", toy_batch()), [[-0.4, -0.1, 0.3, 0.6]])


def test_an_anchor_keeps_a_signal_in_flat_groups() -> None:
    batch = toy_batch(torch.cat([REWARDS, FLAT]))
    got = prepared(preset("vgpo_value_anchor"), batch).fields["advantages"][:, 0, :, 0]
    assert_close(got, [[-1.3431, -0.5252, 0.5652, 1.3831], [0.05] * 4], 1e-4)


def test_soft_value_baseline() -> None:
    got = advantage.log_mean_exp_baseline(REWARDS, baseline_temperature=1.0)
    assert_close(got, REWARDS - 0.7712)


def test_weights_of_advantages_and_rewards() -> None:
    deviations = REWARDS - 0.7
    got = advantage.exponential_weight(deviations, exponent_temperature=1.0)
    assert_close(got, [[-0.3033, -0.1637, 0.2443, 0.8244]])
    got = advantage.softmax_weight(REWARDS, weight_temperature=0.5)
    assert_close(got / 4, [[0.0701, 0.1277, 0.2842, 0.5179]])


def gae(values: list[float], reward: float, truncated: bool, **choices: object) -> torch.Tensor:
    mask = torch.ones(1, 1, len(values), dtype=torch.bool)
    return credit.gae(
        tensor([[reward]]), tensor([[values]]), mask, torch.tensor([[truncated]]), **choices
    )


def test_a_truncated_caption_ends_with_its_last_value() -> None:
    got = gae([0.5, 0.6, 0.7], 0.0, True, discount=1.0, gae_lambda=1.0, bootstrap_truncated=True)
    assert_close(got, [[[0.2, 0.1, 0.0]]])


def test_one_step_differences_of_values() -> None:
    got = gae([0.5, 0.6, 0.7], 1.0, False, discount=1.0, gae_lambda=0.0, bootstrap_truncated=False)
    assert_close(got, [[[0.1, 0.1, 0.3]]])


def test_gae_with_lambda_one_is_the_return_minus_the_value() -> None:
    got = gae([0.5, 0.6, 0.7], 1.0, False, discount=1.0, gae_lambda=1.0, bootstrap_truncated=False)
    assert_close(got, [[[0.5, 0.4, 0.3]]])


def test_gae_ignores_padding() -> None:
    mask = torch.tensor([[[True, True, False]]])
    got = credit.gae(
        tensor([[1.0]]),
        tensor([[[0.5, 0.6, 9.0]]]),
        mask,
        torch.tensor([[False]]),
        discount=1.0,
        gae_lambda=1.0,
        bootstrap_truncated=False,
    )
    assert_close(got, [[[0.5, 0.4, 0.0]]])


def test_rewards_to_go_and_means_by_position() -> None:
    mask = torch.tensor([[[True, True, True], [True, False, False]]])
    rewards = tensor([[[1.0, 0.0, 2.0], [4.0, 0.0, 0.0]]])
    got = credit.reward_to_go(rewards, mask, discount=0.5)
    assert_close(got, [[[1.5, 1.0, 2.0], [4.0, 0.0, 0.0]]])
    assert_close(credit.center_by_position(got, mask), [[[-1.25, 0.0, 0.0], [1.25, 0.0, 0.0]]])


def test_weight_of_a_policy_near_an_auxiliary_one() -> None:
    loss = surrogate.constrained_actor(
        tensor([[[-1.0]]]),
        tensor([[[0.2]]]).log(),
        tensor([[[[0.3]]]]).log(),
        tensor([[[0.4]]]),
        auxiliary_weight=0.5,
        actor_temperature=1.0,
    )
    assert_close(loss, [[[1.8271]]])


def test_advantages_of_a_ragged_group_are_those_of_its_captions() -> None:
    valid = torch.tensor([[True, True, False, True]])
    odd = REWARDS.clone()
    odd[0, 2] = 99.0
    for function in (
        lambda r, v: advantage.group_normalize(r, v, eps=0.0),
        advantage.group_center,
        advantage.leave_one_out,
        lambda r, v: advantage.virtual_best(r, v, best_reward=2.0),
        lambda r, v: advantage.log_mean_exp_baseline(r, v, baseline_temperature=1.0),
        lambda r, v: advantage.softmax_weight(r, v, weight_temperature=1.0),
        advantage.best_over_second,
        advantage.relative_to_mean,
    ):
        got = function(odd, valid)[:, [0, 1, 3]]
        assert_close(got, function(REWARDS[:, [0, 1, 3]], None), 1e-12)


def test_exact_flat_groups_give_exact_zeros_whatever_the_rounding() -> None:
    thirds = torch.full((1, 7), 0.1 + 0.2, dtype=torch.float32)
    for name in ("grpo", "nsc", "dr_grpo", "tempo_prefix_tree"):
        batch = toy_batch(thirds[:, :4].to(F64))
        assert advantages_of(name, batch).abs().max() == 0.0
    assert advantage.group_normalize(thirds, eps=0.0).abs().max() == 0.0
