"""Worked numbers of selection and of the plans for sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from objectives_toy import (
    FLAT,
    REWARDS,
    REWARDS_2,
    VALID,
    advantages_of,
    assert_close,
    loss_of,
    prepared,
    tensor,
    toy_batch,
)

from rayrl.objectives import masks, planners, preset, ratio, sampling, select, weights


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flat_groups_are_dropped_by_dynamic_sampling() -> None:
    both = torch.cat([REWARDS, FLAT])
    spread = select.spread_above(both, VALID.expand(2, 4), min_spread=0.38)
    assert_close(spread, [[1.0] * 4, [0.0] * 4])
    ready = prepared(preset("dapo"), toy_batch(both))
    assert ready.normalizer().captions == 4
    assert ready.normalizer().tokens == 11


def test_truncated_captions_are_dropped() -> None:
    truncated = torch.tensor([[False, True, False, False]])
    assert_close(select.not_truncated(truncated, REWARDS), [[1.0, 0.0, 1.0, 1.0]])


def test_draws_in_proportion_to_the_square_of_the_reward() -> None:
    many = REWARDS.expand(1, 4).repeat(4000, 1)
    counts = select.resample_by_power(
        many, torch.ones_like(many, dtype=torch.bool), draw(), reward_power=2.0
    )
    assert_close(counts.sum(1), torch.full((4000,), 4.0))
    assert_close(counts.mean(0) / 4, [0.0157, 0.0984, 0.3189, 0.5669], 0.01)


def test_draws_of_extremes_and_of_the_best() -> None:
    many = REWARDS.repeat(4000, 1)
    valid = torch.ones_like(many, dtype=torch.bool)
    ends = select.resample_extremes(many, valid, draw(), other_weight=0.0)
    assert_close(ends.mean(0) / 4, [0.5, 0.0, 0.0, 0.5], 0.01)
    best = select.resample_best(many, valid, draw(), best_weight=0.4)
    assert_close(best.mean(0) / 4, [1 / 7, 1 / 7, 1 / 7, 4 / 7], 0.01)


def test_power_zero_keeps_the_group() -> None:
    assert_close(select.resample_by_power(REWARDS, VALID, draw(), reward_power=0.0), [[1.0] * 4])


def test_resampled_captions_count_as_often_as_they_were_drawn() -> None:
    objective = preset("pf_ppo_filtration", ddof=0, eps=0.0)
    ready = prepared(objective, toy_batch())
    counts = ready.fields["caption_weights"]
    assert float(counts.sum()) == 4
    # Advantages are those of the whole group, before anything is drawn.
    assert_close(
        ready.fields["advantages"][:, 0, :, 0], advantages_of("grpo", toy_batch(), eps=0.0)
    )


def test_the_same_step_draws_the_same_captions() -> None:
    objective, batch = preset("pf_ppo_filtration"), toy_batch(REWARDS.repeat(8, 1))
    state = objective.initial_state()
    following, first = objective.prepare(state, batch)
    again = objective.prepare(state, batch)[1]
    later = objective.prepare(following, batch)[1]
    assert_close(first.fields["caption_weights"], again.fields["caption_weights"])
    assert (first.fields["caption_weights"] != later.fields["caption_weights"]).any()


def test_best_of_n_trains_on_the_best_caption() -> None:
    assert_close(loss_of("superhf_best_of_n", overrides={"kl_coef": 0.0}), 0.8167)


def test_calibrated_raft_takes_the_best_caption_that_passes() -> None:
    ok = torch.tensor([[True, True, False, True]])
    batch = toy_batch(judge_ok=ok, greedy_rewards=tensor([0.6]))
    ready = prepared(preset("raft_crraft"), batch)
    assert_close(ready.fields["caption_weights"], [[0.0, 0.0, 0.0, 1.0]])
    assert_close(ready.fields["advantages"][0, 0, 3, 0], 0.6457)
    assert_close(loss_of("raft_crraft", batch), 0.6457 * 0.8167, 1e-4)


def test_calibrated_raft_skips_an_image_where_nothing_passes() -> None:
    batch = toy_batch(judge_ok=~VALID, greedy_rewards=tensor([0.6]))
    ready = prepared(preset("raft_crraft"), batch)
    assert ready.normalizer().captions == 0
    assert loss_of("raft_crraft", batch) == 0.0


def test_bad_captions_are_dropped_until_they_balance_the_good() -> None:
    skewed = tensor([[0.2, 0.3, 0.4, 1.2]])
    ready = prepared(preset("red_drop"), toy_batch(skewed))
    keep = ready.fields["caption_weights"]
    assert float(keep.sum()) == 2
    assert float(keep[0, 3]) == 1
    # The mean is that of the two captions that are left.
    left = skewed[keep > 0]
    assert_close(ready.fields["advantages"][0, 0, 3, 0], 1.2 - left.mean())
    balanced = prepared(preset("red_drop"), toy_batch()).fields["caption_weights"]
    assert_close(balanced, [[1.0] * 4])


def test_solved_groups_are_dropped() -> None:
    both = torch.cat([REWARDS, FLAT])
    got = select.not_all_good(both, VALID.expand(2, 4), good_reward=1.0)
    assert_close(got, [[1.0] * 4, [0.0] * 4])


def test_hints_for_images_of_which_all_captions_fail() -> None:
    rewards = [[0.0, 0.0], [0.0, 0.1]]
    assert planners.needs_hint(rewards, hint_floor=0.0).tolist() == [True, False]
    reference = list(range(10))
    shares = (0.25, 0.5, 0.75)
    lengths = [
        len(planners.reference_prefix(reference, stage, hint_shares=shares)) for stage in range(4)
    ]
    assert lengths == [2, 5, 7, 7]


def test_hinted_tokens_train_nothing() -> None:
    forced = torch.zeros(1, 4, 3, dtype=torch.bool)
    forced[0, 0, :2] = True
    assert_close(masks.sampled_only(forced)[0, 0], [0.0, 0.0, 1.0])
    ready = prepared(preset("ghpo_reference_hints"), toy_batch(forced=forced))
    assert ready.normalizer().tokens == 9


def test_hinted_captions_are_weighed_against_the_context_they_were_sampled_in() -> None:
    assert_close(ratio.over_rollout(tensor([-3.0]), tensor([-2.2])).exp(), [0.4493])


def test_only_forced_tokens_of_high_entropy_train() -> None:
    forced = torch.tensor([[[True, True, True, False]]])
    entropy = tensor([[[2.1, 0.1, 0.9, 0.0]]])
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    got = weights.forced_high_entropy(forced, entropy, mask, forced_share=1 / 3)
    assert_close(got, [[[1.0, 0.0, 0.0, 1.0]]])


def test_improbable_tokens_train() -> None:
    old = tensor([[[0.5, 0.95, 0.9]]]).log()
    assert_close(masks.improbable(old, probable=0.9), [[[1.0, 0.0, 0.0]]], 1e-12)


def test_half_widths_and_priorities_of_an_image_with_four_captions() -> None:
    spread = float(REWARDS.std())
    widths = planners.half_width([4, 5], [spread, spread])
    assert widths == pytest.approx([0.6996, 0.5459], abs=1e-4)
    # The sum over images is 64 captions.
    got = planners.priority([4, 60], [spread, spread], exploration=0.1)[0]
    shrink = 0.1537 + 0.1 * math.sqrt(math.log(65) / 4)
    assert got == pytest.approx(shrink, abs=1e-4)
    assert got == pytest.approx(0.2558, abs=1e-4)


def test_captions_go_to_images_with_the_widest_spread() -> None:
    given = planners.allocate([4, 4, 4], [0.1, 1.0, 0.1], 3, exploration=0.0)
    assert given.tolist() == [0, 3, 0]
    even = planners.allocate([4, 4, 4], [0.5, 0.5, 0.5], 6, exploration=0.0)
    assert even.tolist() == [2, 2, 2]


def test_allocation_needs_two_captions_of_each_image() -> None:
    with pytest.raises(ValueError, match="image 1: 1 captions, want at least 2"):
        planners.allocate([2, 1], [0.1, 0.1], 1, exploration=0.0)


def test_changes_of_easy_and_hard_images() -> None:
    rewards = np.array([[0.8, 1.0], [0.3, 0.5]])
    assert planners.change_strength(rewards, 0.6) == pytest.approx([0.3, -0.2])


def test_hinted_captions_replace_worse_ones() -> None:
    got = planners.replace_worst([0.0, 0.5, 0.1], [0.05, 0.9, 0.2], injected=2)
    assert got == [(0, 1), (2, 2)]
    assert planners.replace_worst([1.0, 2.0], [0.5], injected=2) == []


def test_the_driver_finds_the_planners_with_their_parameters() -> None:
    objective = preset("ghpo_reference_hints", hint_floor=0.2)
    (hint,) = objective.planners(0)
    assert hint.params == {"hint_floor": 0.2, "hint_shares": (0.25, 0.5, 0.75)}
    assert hint.function is sampling.hint_by_prefix
    assert hint.inputs == ("drawn", "encode")
    assert objective.needs == {"forced"}


def test_phases_take_turns() -> None:
    objective = preset("veripo_schedule", phase_steps=(2, 1))
    state, phases = objective.initial_state(), []
    for _ in range(7):
        state, ready = objective.prepare(state, toy_batch(REWARDS_2))
        phases.append(ready.phase)
        state, _ = objective.control(state, {})
    assert phases == [0, 0, 1, 0, 0, 1, 0]
    assert objective.needs == {"ref_logprobs"}
    assert state["phase_0"]["step"] == 5
