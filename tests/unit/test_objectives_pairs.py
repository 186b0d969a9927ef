"""Worked numbers of the preference losses: best is the fourth caption, worst the first."""

from __future__ import annotations

import math

import pytest
import torch
from objectives_toy import (
    CLIP,
    F64,
    LABELS,
    LENGTHS,
    MASK,
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

from rayrl.objectives import group_loss, links, margins, pairs, preset, scores
from rayrl.objectives.plan import part

DRIFT = scores.over_reference(POLICY, REF, MASK)
BEST_WORST = pairs.best_worst(REWARDS, VALID, min_gap=0.0)


def best_worst(values: torch.Tensor) -> torch.Tensor:
    return values[0, 3, 0]


def test_online_dpo() -> None:
    assert_close(DRIFT, [[0.2, -0.05, 0.3, 0.05]])
    assert_close(best_worst(margins.difference(DRIFT, beta=0.1)), -0.0150)
    assert_close(loss_of("online_dpo"), 0.7007)


def test_simpo_and_rpo() -> None:
    assert_close(loss_of("simpo"), 1.1654)
    assert_close(loss_of("rpo_regularized"), 0.6980)


def test_p3o() -> None:
    moved = scores.over_old(POLICY, OLD, MASK).exp()
    assert_close(moved[0, [3, 0]], [1.1618, 1.4191])
    got = group_loss.pairwise_policy_gradient(POLICY, OLD, MASK, REWARDS, BEST_WORST, pair_clip=0.2)
    assert_close(got, [-0.5771])


def test_p3o_drops_a_pair_that_has_moved_far_enough() -> None:
    logprobs = OLD.clone()
    logprobs[0, 3, 0] += 0.3
    got = group_loss.pairwise_policy_gradient(
        logprobs, OLD, MASK, REWARDS, BEST_WORST, pair_clip=0.2
    )
    assert_close(got, [0.0])


def test_a_caption_that_is_left_out_is_of_no_best_level() -> None:
    got = margins.favour_top(
        tensor([[0.4, 0.0, 0.0]]),
        tensor([[-2.0, -3.0, 0.0]]),
        torch.tensor([[True, True, False]]),
        beta=1.0,
        top_factor=2.5,
    )
    assert float(got[0, 0, 1]) == pytest.approx(1.0)


def test_trpa_over_five_pairs_of_three_levels() -> None:
    levels = tensor([[1.0, 2.0, 2.0, 3.0]])
    assert_close(scores.mean_over_reference(POLICY, REF, MASK), [[0.0667, -0.0167, 0.15, 0.0167]])
    assert int((pairs.across_levels(levels, VALID) > 0).sum()) == 5
    choices = {"labels": lambda raw_rewards: levels}
    assert_close(loss_of("trpa_levels", overrides=choices), 0.7343)


def test_levels_are_steps_of_the_reward() -> None:
    objective = preset("trpa_levels", level_width=0.5)
    ready = objective.prepare(objective.initial_state(), toy_batch())[1]
    assert_close(ready.fields["labels"], [[0.0, 1.0, 1.0, 2.0]])


def test_codpo_with_the_third_caption_violating() -> None:
    ok = torch.tensor([[True, True, False, True]])
    assert_close(loss_of("codpo", toy_batch(judge_ok=ok)), 1.5224)


def test_codpo_without_violations_and_without_satisfaction() -> None:
    everything = pairs.satisfying_violating(REWARDS, VALID, VALID)
    assert_close(everything, BEST_WORST)
    nothing = pairs.satisfying_violating(REWARDS, ~VALID, VALID)
    assert_close(nothing, torch.zeros(1, 4, 4))


def test_prdp_is_the_variance_of_what_is_not_predicted() -> None:
    free = {"token_clip": 1e9}
    assert_close(loss_of("prdp_reward_difference", overrides=free) / 0.01, 14.5431, 1e-4)
    assert_close((DRIFT - REWARDS / 0.1).var(correction=0), 14.5431, 1e-4)
    clipped = loss_of("prdp_reward_difference", overrides={"token_clip": 0.1})
    assert_close(clipped / 0.01, 14.8606, 1e-4)


def test_maximum_preference() -> None:
    assert_close(loss_of("mpo_maximum_preference", overrides={"regularizers": ""}), -0.5175)


def test_chi_po() -> None:
    phi = scores.chi_squared(POLICY, REF, MASK)
    assert_close(phi[0, [3, 0]], [1.1013, 1.4214])
    assert_close(loss_of("chi_po"), 0.7093)


def test_modpo_with_the_clip_score_as_its_margin() -> None:
    batch = toy_batch(terms={"cider_d": REWARDS, "clip_score": CLIP})
    assert_close(loss_of("modpo", batch), 0.6410)


def test_momentum_is_a_decision_about_weights() -> None:
    objective = preset("apo_momentum")
    _, decisions = objective.control(objective.initial_state(), {})
    assert 0.50 + decisions["extrapolate"] * (0.50 - 0.40) == pytest.approx(0.53)


def test_tgdpo_with_guided_tokens() -> None:
    # beta (guide - ref) is .2, -.1, .4 in the best caption and -.3, .1, 0 in the worst.
    credit = torch.zeros(1, 4, 3, dtype=F64)
    credit[0, 3], credit[0, 0] = tensor([0.2, -0.1, 0.4]), tensor([-0.3, 0.1, 0.0])
    guide = REF + credit / 0.1
    got = margins.guided_tokens(POLICY, REF, guide, MASK, beta=0.1, guidance=0.5)
    assert_close(best_worst(got), 0.1 * (0.03 - 0.21))
    assert_close(loss_of("tgdpo", toy_batch(guide_logprobs=guide)), 0.7022)


def test_two_betas() -> None:
    assert_close(loss_of("dpo_two_betas"), 0.6957)


def test_heads_of_two_terms() -> None:
    gaps = tensor([-0.15, 0.3])
    heads = torch.zeros(1, 2, 1, 2, dtype=F64)
    heads[0, 0, 0] = gaps
    got = group_loss.heads(
        heads,
        torch.zeros(1, 2, 1, dtype=F64),
        torch.ones(1, 2, 1, dtype=torch.bool),
        {"a": tensor([[1.0, 0.0]]), "b": tensor([[1.0, 0.0]])},
        VALID[:, :2],
        beta=0.1,
    )
    assert_close(got, [0.6895])


def test_heads_must_be_as_many_as_terms() -> None:
    with pytest.raises(ValueError, match="2 heads for 1 reward terms"):
        group_loss.heads(
            torch.zeros(1, 4, 3, 2, dtype=F64), REF, MASK, {"a": REWARDS}, VALID, beta=0.1
        )


def test_a_caption_under_a_changed_image() -> None:
    def one(x: float) -> torch.Tensor:
        return tensor([[[x]]])

    got = group_loss.changed_image(
        one(-4.0),
        one(-4.2),
        one(-6.0),
        one(-5.5),
        torch.ones(1, 1, 1, dtype=torch.bool),
        tensor([[[1.0]]]),
        beta=0.1,
    )
    assert_close(got, [0.6588])


def test_captions_of_an_earlier_checkpoint() -> None:
    two = tensor([[0.05, 0.2]])
    worse = margins.signed_by_reward(two, tensor([[1.2, 0.2]]), beta=0.1)[0, 0, 1]
    better = margins.signed_by_reward(two, tensor([[0.2, 1.2]]), beta=0.1)[0, 0, 1]
    assert_close(-torch.nn.functional.logsigmoid(torch.stack([worse, better])), [0.7007, 0.6807])
    earlier = torch.tensor([[False, True, True, False]])
    chosen = pairs.best_against_earlier(REWARDS, earlier, VALID)
    want = torch.zeros(1, 4, 4, dtype=F64)
    want[0, 3, 1] = want[0, 3, 2] = 0.5
    assert_close(chosen, want)


def test_soft_labels_and_hardness() -> None:
    assert 1 / (1 + math.exp(-2)) == pytest.approx(0.8808, abs=5e-5)
    assert_close(loss_of("smpo_soft_label"), 0.6989)
    assert_close(loss_of("hanorec_hardness"), 0.3530)


def test_further_links() -> None:
    h = tensor([[[0.5]]])
    logistic = math.log1p(math.exp(-0.5))
    assert_close(links.hinge(h), [[[0.5]]])
    assert_close(links.squared(h, beta=0.1), [[[0.0]]])
    assert_close(links.sigmoid(h), [[[-1 / (1 + math.exp(-0.5))]]])
    assert_close(links.robust(h, label_noise=0.0), [[[logistic]]])
    flipped = math.log1p(math.exp(0.5))
    assert_close(links.robust(h, label_noise=0.1), [[[(0.9 * logistic - 0.1 * flipped) / 0.8]]])


def test_scores_of_other_divergences_agree_to_first_order() -> None:
    small = tensor([[[1e-4]]])
    zero, one = torch.zeros_like(small), torch.ones(1, 1, 1, dtype=torch.bool)
    assert_close(scores.forward_kl(small, zero, one), [[-1 + 1e-4]], 1e-7)
    assert_close(scores.jensen_shannon(small, zero, one), [[0.5e-4]], 1e-7)


def test_all_pairs_and_pairs_that_are_too_close() -> None:
    chosen = pairs.all_pairs(REWARDS, VALID, min_gap=0.35)
    # 0.9 and 1.2 over 0.2, 0.9 and 1.2 over 0.5: the gap 0.3 is too small.
    want = torch.zeros(1, 4, 4, dtype=F64)
    for i, j in ((2, 0), (2, 1), (3, 0), (3, 1)):
        want[0, i, j] = 0.25
    assert_close(chosen, want)
    assert_close(pairs.best_worst(REWARDS, VALID, min_gap=1.0), torch.zeros(1, 4, 4))


def test_dropped_captions_are_in_no_pair() -> None:
    valid = torch.tensor([[False, True, True, False]])
    want = torch.zeros(1, 4, 4, dtype=F64)
    want[0, 2, 1] = 1.0
    for chosen in (
        pairs.best_worst(REWARDS, valid, min_gap=0.0),
        pairs.all_pairs(REWARDS, valid, min_gap=0.0),
        pairs.across_levels(LABELS, valid),
        pairs.each_once(REWARDS, valid),
        4 * pairs.half_square(REWARDS, valid),
        pairs.satisfying_violating(REWARDS, torch.tensor([[True, False, True, True]]), valid),
        pairs.shorter_good(LABELS, LENGTHS, valid, max_tokens=9, brevity_temperature=1.0),
    ):
        assert_close(chosen, want)


def test_a_group_without_a_pair_does_not_count_in_the_mean() -> None:
    flat = torch.ones_like(REWARDS)
    both = toy_batch(torch.cat([REWARDS, flat]))
    assert_close(loss_of("online_dpo", both), 0.7007)
    only_flat = loss_of("online_dpo", toy_batch(flat))
    assert only_flat == 0.0


def test_a_part_of_ones_own_takes_a_slot() -> None:
    own = {"link": part(lambda margins, *, power: -margins.pow(power), power=2)}
    assert_close(loss_of("online_dpo", overrides=own), -(0.015**2), 1e-9)
