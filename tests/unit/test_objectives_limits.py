"""Invariances and limits of the objectives, on the small group and on random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from objectives_toy import (
    CLIP,
    EXACT,
    F64,
    FLAT,
    MASK,
    MOVED,
    OLD,
    POLICY,
    REF,
    REWARDS,
    REWARDS_2,
    TinyPolicy,
    advantages_of,
    assert_close,
    loss_of,
    prepared,
    synthetic_batch,
    tensor,
    toy_batch,
)

from rayrl.objectives import (
    group_loss,
    pairs,
    preset,
    regularize,
    scores,
    shaping,
    stats,
    surrogate,
)
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.plan import part

TREE = torch.tensor([[[1, 2, 3], [1, 2, 4], [1, 5, 4], [6, 5, 4]]])
EPS = {"eps": 0.0}
STREAM = {"process_noise": 1e-5, "measurement_noise": 1e-2}
SHIFT_FREE = (
    ("grpo", EPS),
    ("nsc", {}),
    ("reinforce_plus_plus_baseline", EPS),
    ("dr_grpo", {}),
    ("tempo_prefix_tree", EPS),
    ("xrpo_novelty", EPS),
    ("asymre_shifted", {}),
    ("rwr_softmax", {}),
)
SCALE_FREE = (
    ("grpo", EPS),
    ("tempo_prefix_tree", EPS),
    ("xrpo_novelty", EPS),
    ("reinforce_plus_plus", EPS),
    ("reinforce_plus_plus_baseline", EPS),
)
PERMUTABLE = (
    ("grpo", EPS),
    ("nsc", {}),
    ("ngrpo_virtual_best", {"best_reward": 3.0, "select": ""}),
    ("dcpo_dynamic_clip", EPS),
    ("tempo_prefix_tree", EPS),
    ("xrpo_novelty", EPS),
)


def batch_of(rewards: torch.Tensor, order: list[int] | None = None) -> GroupBatch:
    """Groups of these rewards with a prefix tree; the captions in another order."""
    order = order or [0, 1, 2, 3]
    batch = toy_batch(rewards[:, order])
    p = len(rewards)
    return replace(
        batch,
        token_ids=TREE.expand(p, 4, 3)[:, order],
        mask=MASK.expand(p, 4, 3)[:, order],
        old_logprobs=OLD.expand(p, 4, 3)[:, order],
        terms={"cider_d": rewards[:, order], "clip_score": CLIP.expand(p, 4)[:, order]},
    )


def test_a_shift_of_an_images_rewards_changes_nothing() -> None:
    both = torch.cat([REWARDS, REWARDS_2])
    shifted = both + tensor([[0.3], [-0.2]])
    for name, overrides in SHIFT_FREE:
        got = advantages_of(name, batch_of(shifted), **overrides)
        assert_close(got, advantages_of(name, batch_of(both), **overrides), 1e-9)


def test_a_shift_changes_what_has_an_absolute_scale() -> None:
    both = torch.cat([REWARDS, REWARDS_2])
    shifted = both + tensor([[0.3], [-0.2]])
    for name, overrides in (
        ("reinforce_plus_plus", EPS),
        ("krpo_kalman", {}),
        ("ngrpo_virtual_best", {"select": ""}),
        ("vgpo_value_anchor", {}),
        ("maxrl", {}),
    ):
        got = advantages_of(name, batch_of(shifted), **overrides)
        assert (got - advantages_of(name, batch_of(both), **overrides)).abs().max() > 1e-3, name


def test_scst_is_shifted_with_its_greedy_reward() -> None:
    def greedy(rewards: torch.Tensor, reward: float) -> torch.Tensor:
        return advantages_of("scst", replace(batch_of(rewards), greedy_rewards=tensor([reward])))

    assert_close(greedy(REWARDS + 0.3, 0.9), greedy(REWARDS, 0.6))
    assert (greedy(REWARDS + 0.3, 0.6) - greedy(REWARDS, 0.6)).abs().min() > 0.2


def test_a_scale_changes_nothing_where_the_spread_divides() -> None:
    both = torch.cat([REWARDS, REWARDS_2])
    for name, overrides in SCALE_FREE:
        got = advantages_of(name, batch_of(7 * both), **overrides)
        assert_close(got, advantages_of(name, batch_of(both), **overrides), 1e-9)
    for name in ("nsc", "dr_grpo"):
        assert_close(
            advantages_of(name, batch_of(7 * both)), 7 * advantages_of(name, batch_of(both))
        )


def test_gdpo_does_not_see_the_scale_of_a_term() -> None:
    def of(first: float, second: float) -> torch.Tensor:
        batch = batch_of(torch.cat([REWARDS, REWARDS_2]))
        clip_score = second * batch.terms["clip_score"]
        scaled = {"cider_d": first * batch.rewards, "clip_score": clip_score}
        return advantages_of("gdpo", replace(batch, terms=scaled), **EXACT, batch_eps=0.0)

    assert_close(of(7.0, 0.2), of(1.0, 1.0), 1e-9)


def test_permuted_captions_have_permuted_advantages() -> None:
    order = [2, 0, 3, 1]
    for name, overrides in PERMUTABLE:
        got = advantages_of(name, batch_of(REWARDS, order), **overrides)
        assert_close(got, advantages_of(name, batch_of(REWARDS), **overrides)[:, order], 1e-9)
    moved = advantages_of("krpo_kalman", batch_of(REWARDS, order))
    assert (moved - advantages_of("krpo_kalman", batch_of(REWARDS))[:, order]).abs().max() > 0.1


def test_advantages_add_up_to_zero() -> None:
    for name in ("grpo", "nsc", "dr_grpo", "rloo"):
        assert_close(advantages_of(name, batch_of(REWARDS)).sum(), 0.0, 1e-9)
    assert_close(advantages_of("asymre_shifted", batch_of(REWARDS)).sum(), 0.4, 1e-9)
    assert advantages_of("ngrpo_virtual_best", batch_of(REWARDS), select="").sum() < -0.5
    assert advantages_of("xrpo_novelty", batch_of(REWARDS)).sum() > 0.01


def test_increasing_maps_of_the_rewards_do_not_change_ranks() -> None:
    for function in (shaping.quantile_in_group, shaping.win_rate):
        assert_close(function((3 * REWARDS).exp()), function(REWARDS), 1e-12)
    assert_close(
        shaping.quantile_in_group(tensor([[0.0, 0.0, 1.0, 2.0]])), [[0.25, 0.25, 0.625, 0.875]]
    )


def test_flat_groups() -> None:
    for name in ("grpo", "nsc", "dr_grpo", "tempo_prefix_tree"):
        both = advantages_of(name, batch_of(torch.cat([REWARDS, FLAT])))
        assert both[1].abs().max() == 0.0, name
    for name, overrides in (
        ("ngrpo_virtual_best", {"best_reward": 3.0, "select": ""}),
        ("asymre_shifted", {}),
        ("vgpo_value_anchor", {}),
        ("reinforce_plus_plus", {}),
    ):
        both = advantages_of(name, batch_of(torch.cat([REWARDS, FLAT])), **overrides)
        first = both[1] if both.ndim == 2 else both[1, :, 0]
        assert first.abs().min() > 1e-3, name


def test_one_term_of_gdpo_is_grpo_then_whitened() -> None:
    batch = toy_batch(torch.cat([REWARDS, REWARDS_2]))
    got = advantages_of("gdpo", batch, **EXACT, batch_eps=0.0)
    assert_close(got, advantages_of("grpo", batch, eps=0.0), 1e-9)


def grad_of(name: str, policy: torch.Tensor, **overrides: Any) -> torch.Tensor:
    """Gradient of a preset's loss in the log-probs of a group whose captions have equal lengths."""
    objective = preset(name, **overrides)
    batch = replace(
        toy_batch(),
        mask=torch.ones(1, 4, 3, dtype=torch.bool),
        old_logprobs=OLD - 0.1,
        rollout_logprobs=OLD - 0.1,
    )
    ready = prepared(objective, batch)
    logprobs = policy.clone().requires_grad_()
    entropy = torch.ones_like(logprobs)
    objective.loss(ready, logprobs, ready.normalizer(), entropy=entropy).loss.backward()
    return logprobs.grad


NORMALISED = part("group_normalize", eps=0.0, ddof=0)
ON_POLICY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("grpo", {"kl_coef": 0.0}),
    ("dapo", {"overlong_coef": 0.0}),
    ("gspo", {}),
    ("cispo", {}),
    ("gmpo", {}),
    ("sapo", {}),
    ("bapo_adaptive_clip", {}),
    ("espo_early_stop", {}),
    ("bgpo_linear_bound", {}),
    ("rec_one_side", {}),
    ("rec_two_side", {}),
    ("rec_ring", {}),
    ("vespo", {}),
    ("topr", {}),
    ("r2vpo", {}),
    ("opmd_squared", {}),
    ("sso", {}),
    ("grpo_dual_clip", {}),
    ("intellect2_two_sided", {}),
    ("icepop", {}),
    ("chunk_grpo", {}),
    ("dcpo_dynamic_clip", {"reducer": "token_mean"}),
    ("high_entropy_tokens", {"entropy_share": 1.0}),
)


@pytest.mark.parametrize(("name", "overrides"), ON_POLICY, ids=[name for name, _ in ON_POLICY])
def test_at_the_old_policy_the_gradient_is_that_of_reinforce(
    name: str, overrides: dict[str, Any]
) -> None:
    advantages = (REWARDS - 0.7) / REWARDS.std(correction=0)
    got = grad_of(name, OLD - 0.1, advantage=NORMALISED, **overrides)
    assert_close(got, (-advantages[..., None] / 12).expand(1, 4, 3), 1e-9)


def test_one_side_rec_has_the_gradient_of_the_clip_at_any_policy() -> None:
    draw = torch.Generator().manual_seed(0)
    far = OLD - 0.1 + 0.4 * torch.randn(1, 4, 3, generator=draw, dtype=F64)
    clipped = grad_of("grpo", far, advantage="group_center", kl_coef=0.0)
    assert (clipped == 0).any()
    assert_close(grad_of("rec_one_side", far), clipped, 1e-9)


def test_sums_over_pairs_are_sums_of_deviations() -> None:
    draw = torch.Generator().manual_seed(1)
    r, sums = (torch.rand(1, 5, generator=draw, dtype=F64) for _ in range(2))
    valid = torch.ones(1, 5, dtype=torch.bool)
    mask = torch.ones(1, 5, 1, dtype=torch.bool)
    weights = pairs.each_once(r, valid)
    logprobs = sums[..., None]
    got = group_loss.pairwise_policy_gradient(logprobs, logprobs, mask, r, weights, pair_clip=0.2)
    assert_close(got, -5 / 2 * ((r - r.mean()) * sums).sum(1), 1e-9)


def gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    x = at.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


def preference(name: str, drift: torch.Tensor, **overrides: Any) -> torch.Tensor:
    """Loss of the better of two one-token captions with these log-ratios to the reference."""
    objective = preset(name, **overrides)
    zeros = torch.zeros(1, 2, 1, dtype=F64)
    batch = GroupBatch(
        image_ids=("a",),
        token_ids=zeros.long(),
        mask=torch.ones(1, 2, 1, dtype=torch.bool),
        rollout_logprobs=zeros,
        old_logprobs=zeros,
        terms={},
        rewards=tensor([[1.0, 0.0]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
        truncated=torch.zeros(1, 2, dtype=torch.bool),
        ref_logprobs=zeros,
    )
    ready = prepared(objective, batch)
    return objective.loss(ready, drift.view(1, 2, 1), ready.normalizer()).loss


def test_gradients_of_preferences_at_equal_log_probs() -> None:
    at = torch.zeros(2, dtype=F64)
    dpo = gradient(lambda x: preference("online_dpo", x), at)
    assert_close(dpo, [-0.05, 0.05], 1e-12)
    mpo = gradient(lambda x: preference("mpo_maximum_preference", x, regularizers=""), at)
    assert_close(mpo, dpo / 2, 1e-12)
    assert_close(gradient(lambda x: preference("chi_po", x), at), 2 * dpo, 1e-12)


def test_limits_of_preferences() -> None:
    at = tensor([0.3, -0.2])
    dpo = preference("online_dpo", at)
    assert_close(preference("dpo_two_betas", at, beta_worse=0.1), dpo, 1e-12)
    assert_close(preference("hanorec_hardness", at, hardness=0.0), dpo, 1e-12)
    assert_close(preference("smpo_soft_label", at, label_slope=1e4), dpo, 1e-12)
    assert_close(preference("rpo_regularized", at, beta=0.1, nll_coef=0.0), dpo, 1e-12)
    assert_close(preference("trpa_levels", at, beta=0.1, top_factor=1.0), dpo, 1e-12)
    assert_close(preference("simpo", at, beta=0.1, target=0.0), dpo, 1e-12)


def test_pacs_starts_at_log_two_with_centred_labels_as_advantages() -> None:
    labels = tensor([[0.0, 1.0, 1.0, 0.0]])
    valid = torch.ones(1, 4, dtype=torch.bool)

    def loss(s: torch.Tensor) -> torch.Tensor:
        return group_loss.leave_one_out_bce(s, labels, valid, beta=1.0).mean(1)

    zeros = torch.zeros(1, 4, dtype=F64)
    assert_close(loss(zeros), torch.log(tensor([2.0])), 1e-12)
    assert_close(gradient(loss, zeros), -(labels - 0.5) / 3, 1e-12)


def test_regressions_start_with_the_gradient_of_group_reinforce() -> None:
    deviation = REWARDS - 0.7
    zeros = torch.zeros(1, 4, dtype=F64)
    got = gradient(lambda s: group_loss.regression(s, deviation, score_factor=0.1).mean(1), zeros)
    assert_close(got, -2 * 0.1 / 4 * deviation, 1e-12)
    beta, mask = 0.5, torch.ones(1, 4, 1, dtype=torch.bool)
    weights = pairs.half_square(REWARDS, torch.ones(1, 4, dtype=torch.bool))
    nothing = torch.zeros(1, 4, 1, dtype=F64)
    prdp = gradient(
        lambda x: group_loss.reward_difference(
            x, nothing, nothing, mask, REWARDS, weights, beta=beta, token_clip=1e9
        ),
        nothing,
    )
    assert_close(prdp[..., 0], -2 * beta / 4 * deviation, 1e-12)


def test_standardised_regression_has_a_finite_first_gradient_along_the_advantage() -> None:
    advantages = (REWARDS - 0.7) / REWARDS.std(correction=0)
    got = gradient(
        lambda s: group_loss.standardized_regression(
            s, advantages, torch.ones(1, 4, dtype=torch.bool), spread_floor=0.1
        ),
        torch.zeros(1, 4, dtype=F64),
    )
    assert_close(got, -2 / 0.1 * advantages, 1e-9)


def test_posterior_matching_starts_as_a_softmax_advantage() -> None:
    zeros = torch.zeros(1, 4, 1, dtype=F64)
    got = gradient(
        lambda x: group_loss.posterior_matching(
            x,
            zeros,
            zeros,
            torch.ones(1, 4, 1, dtype=torch.bool),
            REWARDS,
            torch.ones(1, 4, dtype=torch.bool),
            posterior_temperature=1.0,
        ),
        zeros,
    )
    assert_close(got[..., 0], -(torch.softmax(REWARDS, 1) - 0.25), 1e-12)


def test_chunks_of_one_token_and_of_the_caption() -> None:
    chunk = {**EXACT, "clip_low": 0.2, "clip_high": 0.2}
    one = loss_of("chunk_grpo", overrides={**chunk, "segment_length": 1})
    assert_close(one, loss_of("grpo_deepseekmath", overrides={**chunk, "kl_coef": 0.0}), 1e-12)
    whole = loss_of("chunk_grpo", overrides={**chunk, "segment_length": 9})
    assert_close(whole, loss_of("gspo", overrides=chunk), 1e-12)


def test_disco_and_drpo_at_infinite_temperatures() -> None:
    quiet = {"kl_penalty": 0.0}
    hot = loss_of("disco_log_likelihood", overrides={**quiet, "contrast_temperature": 1e7})
    assert_close(hot, loss_of("disco_b", overrides=quiet), 1e-6)
    even = loss_of("drpo_decoupled", overrides={**quiet, "brevity_temperature": 1e9})
    assert_close(even, loss_of("disco_log_likelihood", overrides=quiet), 1e-9)


def test_reducers_agree_for_equal_lengths() -> None:
    batch = replace(toy_batch(), mask=torch.ones(1, 4, 3, dtype=torch.bool))

    def of(reducer: str, **more: Any) -> float:
        overrides = {**EXACT, "kl_coef": 0.0, "reducer": reducer, **more}
        return loss_of("grpo", batch, overrides=overrides)

    mean = of("token_mean")
    assert_close(of("sequence_mean_token_mean"), mean, 1e-12)
    assert_close(of("sequence_mean_token_sum") / 3, mean, 1e-12)
    assert_close(of("constant_length", max_tokens=9) * 9 / 3, mean, 1e-12)
    assert_close(of("sequence_sum_token_mean") / 4, mean, 1e-12)


def exact_kl(estimator: Callable[[torch.Tensor], torch.Tensor], seed: int = 0) -> torch.Tensor:
    """Gradient in six logits of the mean of an estimator, the samples' weights held constant."""
    logits, ref = _two_policies(seed)
    theta = logits.clone().requires_grad_()
    d = theta.log_softmax(0) - ref
    (theta.detach().softmax(0) * estimator(d)).sum().backward()
    return theta.grad


def _two_policies(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, 6, generator=draw, dtype=F64)
    return logits, other.log_softmax(0)


def test_gradients_of_the_kl_estimators() -> None:
    logits, ref = _two_policies(0)

    def estimator(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        function = getattr(regularize, name)
        return lambda d: function(d, torch.zeros_like(d), kl_coef=1.0)

    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.exp() * (first - second)).sum()

    reverse = gradient(lambda x: kl(x.log_softmax(0), ref), logits)
    forward = gradient(lambda x: kl(ref, x.log_softmax(0)), logits)
    assert_close(exact_kl(estimator("kl_k1")), torch.zeros(6), 1e-9)
    assert_close(exact_kl(estimator("kl_k2")), reverse, 1e-9)
    assert_close(exact_kl(estimator("kl_k3_straight")), reverse, 1e-9)
    assert_close(exact_kl(estimator("kl_k3")), forward, 1e-9)
    d = logits.log_softmax(0) - ref
    p = logits.softmax(0)
    assert_close((p * estimator("kl_k3")(d)).sum(), (p * d).sum(), 1e-9)
    assert (estimator("kl_k3")(d) >= 0).all()
    assert_close((p * (d.exp() + (-d).exp() - 2)).sum(), (p * d.exp()).sum() - 1, 1e-9)


def test_gradient_of_the_chi_squared_term() -> None:
    nothing = part(lambda rewards: 0 * rewards)
    objective = preset("chi_squared_regularized", chi_coef=1.0, advantage=nothing)
    ready = prepared(objective, toy_batch())
    logprobs = POLICY.clone().requires_grad_()
    objective.loss(ready, logprobs, ready.normalizer()).loss.backward()
    d = scores.over_reference(POLICY, REF, MASK)
    root = (d.exp() + (-d).exp() - 2).mean().sqrt()
    assert_close(logprobs.grad[..., 0], (d.exp() - (-d).exp()) / 4 / (2 * root), 1e-9)


def test_spread_of_a_batch_of_one_group_is_that_of_the_group() -> None:
    assert_close(stats.whiten(REWARDS), stats.standardize(REWARDS), 1e-12)


def test_no_mismatch_changes_nothing() -> None:
    """Where engine and learner agree every correction is the identity, for any policy."""
    tiny = TinyPolicy(4)
    batch = synthetic_batch(tiny)
    agreeing = replace(batch, rollout_logprobs=batch.old_logprobs)
    policy = torch.where(batch.mask, batch.old_logprobs + 0.1, 0.0)
    want = loss_of("grpo", agreeing, policy, {"mismatch": ""})
    for name in (
        "token_truncated",
        "token_masked",
        "sequence_truncated",
        "sequence_masked",
        "geometric_masked",
    ):
        assert_close(loss_of("grpo", agreeing, policy, {"mismatch": name}), want, 1e-12)
        assert loss_of("grpo", batch, policy, {"mismatch": name}) != pytest.approx(want), name


def test_min_clip_without_bounds_is_the_unclipped_surrogate() -> None:
    ratio, a = MOVED.exp(), (REWARDS - 0.7)[..., None]
    assert_close(surrogate.min_clip(ratio, a, 0.0, 1e9), surrogate.unclipped(ratio, a), 1e-12)
