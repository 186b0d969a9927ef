"""Identities of formulas, and worked numbers that lie between what goes in and what comes out."""

from __future__ import annotations

import math

import pytest
import torch
from objectives_toy import (
    CLIP,
    CLIP_2,
    F64,
    FLAT,
    MASK,
    MOVED,
    NORMALIZED,
    OLD,
    POLICY,
    REF,
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
    group_loss,
    history,
    pairs,
    preset,
    ratio,
    regularize,
    scores,
    select,
    stats,
    surrogate,
)
from rayrl.objectives.reduce import Normalizer

BOTH = torch.cat([REWARDS, REWARDS_2])
SHIFTED = BOTH + tensor([[0.3], [-0.2]])
ORDER = [2, 0, 3, 1]


def two_terms(first: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"cider_d": first, "clip_score": second}


def gdpo(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    batch = toy_batch(sum(terms.values()), terms=terms)
    return advantages_of("gdpo", batch, ddof=0, eps=0.0, batch_eps=0.0)


def test_a_shift_of_any_term_does_not_change_gdpo() -> None:
    clip = torch.cat([CLIP, CLIP_2])
    want = gdpo(two_terms(BOTH, clip))
    assert_close(gdpo(two_terms(SHIFTED, clip)), want, 1e-9)
    assert_close(gdpo(two_terms(BOTH, clip + tensor([[-4.0], [0.5]]))), want, 1e-9)


def test_permuted_captions_have_permuted_advantages_in_gdpo() -> None:
    want = gdpo(two_terms(REWARDS, CLIP))
    assert_close(gdpo(two_terms(REWARDS[:, ORDER], CLIP[:, ORDER])), want[:, ORDER], 1e-12)


def test_advantages_of_gdpo_add_up_to_zero_in_each_group() -> None:
    """Whitening over the batch subtracts a mean of 0 and scales all alike."""
    got = gdpo(two_terms(BOTH, torch.cat([CLIP, CLIP_2])))
    assert_close(got.sum(1), [0.0, 0.0], 1e-12)
    assert_close(got[0], [0.0257, -0.8745, 0.8745, -0.0257])


def rloo(rewards: torch.Tensor, coef: float) -> torch.Tensor:
    return advantages_of("rloo", toy_batch(rewards), reward_kl_coef=coef)


def test_rloo_is_shifted_and_scaled_as_its_rewards_are() -> None:
    assert_close(rloo(SHIFTED, 0.1), rloo(BOTH, 0.1), 1e-12)
    assert_close(rloo(7 * BOTH, 0.0), 7 * rloo(BOTH, 0.0), 1e-12)
    # The penalty has a scale of its own.
    assert (rloo(7 * BOTH, 0.1) - 7 * rloo(BOTH, 0.1)).abs().max() > 0.05
    assert_close(rloo(BOTH, 0.1).sum(1), [0.0, 0.0], 1e-12)
    assert_close(rloo(BOTH, 0.0), advantages_of("nsc", toy_batch(BOTH)), 1e-12)


def test_remax_is_shifted_with_its_greedy_reward() -> None:
    def of(rewards: torch.Tensor, greedy: float) -> torch.Tensor:
        return advantages_of("remax", toy_batch(rewards, greedy_rewards=tensor([greedy])))

    assert_close(of(REWARDS + 0.3, 0.9), of(REWARDS, 0.6), 1e-12)
    assert (of(REWARDS + 0.3, 0.6) - of(REWARDS, 0.6)).abs().min() > 0.2
    # Captions that are better than the greedy one on average have advantages above 0 on average.
    assert_close(of(REWARDS, 0.6).sum(), 0.4, 1e-12)


def smoothed(rewards: torch.Tensor) -> torch.Tensor:
    return history.smoothed(rewards, ("a",), {"a": [1, 0.5, 0.3]}, eps=0.0)[0]


def test_a_memory_of_the_image_fixes_the_scale_and_keeps_the_order_of_no_caption() -> None:
    first = smoothed(REWARDS)
    assert (smoothed(REWARDS + 0.3) - first).abs().max() > 0.1
    assert float(first.sum().abs()) > 0.1
    assert_close(smoothed(REWARDS[:, ORDER]), first[:, ORDER], 1e-12)


def test_a_shift_of_one_image_changes_the_global_half_of_copo_alone() -> None:
    # Four outcomes in each group, before and after: 2 bits, at which both halves count alike.
    rewards = torch.cat([REWARDS, tensor([[0.1, 0.4, 0.7, 1.0]])])
    sizes = {"outcome_width": 0.1, "blend_slope": 20.0, "blend_entropy": 2.0, "eps": 0.0}
    local, world = advantage.local_and_global(rewards, **sizes)
    moved, other = advantage.local_and_global(rewards + tensor([[0.0], [1.0]]), **sizes)
    assert_close(moved, local, 1e-9)
    # The other image was the better one, and now is the worse.
    assert_close(world[:, 0, 0], tensor([0.5, -0.5]) * math.sqrt(0.5), 1e-9)
    assert_close(other, -world, 1e-9)


def test_one_term_alone_is_grpo() -> None:
    want = advantages_of("grpo", toy_batch(BOTH))
    single = toy_batch(BOTH, terms={"cider_d": BOTH})
    for name in ("mo_grpo", "ensemble_worst_case"):
        assert_close(advantages_of(name, single, ddof=0, eps=1e-5), want, 1e-12)


def test_a_group_without_spread_has_no_advantage_even_with_an_eps_of_zero() -> None:
    assert_close(advantage.group_normalize(FLAT, eps=0.0, ddof=0), torch.zeros(1, 4), 0.0)


def test_states_of_the_kalman_filter() -> None:
    x, variance = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    states = []
    for reward in REWARDS[0]:
        x, variance = history._kalman_update(reward[None], x, variance, 1e-5, 1e-2)
        states.append([float(x), float(variance)])
    want = [[0.1980, 0.0099], [0.3483, 0.0050], [0.5319, 0.0033], [0.6991, 0.0025]]
    assert_close(tensor(states), want)


def test_without_process_noise_the_kalman_filter_is_the_running_mean() -> None:
    noise = {"process_noise": 0.0, "measurement_noise": 1e-6}
    got, _ = history.kalman(REWARDS, {}, scope="group", **noise)
    # The last caption is compared with the group's mean.
    spread = math.sqrt(1e-6 / 4)
    assert float(got[0, 3]) * spread == pytest.approx(1.2 - 0.7, abs=1e-4)


def test_how_likely_a_caption_is_among_its_group() -> None:
    mean_logprob = tensor([[[-1.2], [-0.6], [-0.9], [-1.5]]])
    mask, ones = torch.ones(1, 4, 1, dtype=torch.bool), torch.ones(1, 4, dtype=F64)

    def bonus(novelty: float) -> torch.Tensor:
        got = advantage.favour_novel(ones, mean_logprob, mask, novelty=novelty, novelty_cap=9.0)
        return got - 1

    # 1 - eta where that is positive, and eta - 1 where it is not.
    assert_close(1 - bonus(1.0) + bonus(-1.0), [[0.8607, 1.5683, 1.1618, 0.6376]])


def test_predicted_advantages_of_the_standardised_regression() -> None:
    moved = scores.over_old(POLICY, OLD, MASK)

    def loss(wanted: float) -> torch.Tensor:
        target = torch.full_like(moved, wanted)
        return group_loss.standardized_regression(moved, target, VALID, spread_floor=0.0)

    # (a - 0)^2 - (a - 1)^2 = 2 a - 1.
    predicted = (loss(0.0) - loss(1.0) + 1) / 2
    assert_close(predicted, [[0.7720, -1.4739, 1.0528, -0.3509]])


def posterior_gradient(policy: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """In each caption's log-prob."""
    logprobs = policy.clone().requires_grad_()
    group_loss.posterior_matching(
        logprobs, OLD, REF, MASK, REWARDS, VALID, posterior_temperature=temperature
    ).sum().backward()
    return logprobs.grad[..., 0]


def test_posterior_and_model_of_brain() -> None:
    # At the old policy the model is uniform, so the gradient there tells the posterior.
    alpha = 0.25 - posterior_gradient(OLD)
    assert_close(alpha, [[0.1501, 0.1744, 0.2875, 0.3881]])
    assert_close(posterior_gradient(POLICY) + alpha, [[0.2825, 0.1893, 0.2969, 0.2313]])
    for temperature in (0.3, 1.0, 4.0):
        assert_close(posterior_gradient(POLICY, temperature).sum(), 0.0, 1e-12)
    # Without rewards and at the reference nothing is left to learn.
    assert_close(posterior_gradient(REF, 1e12), torch.zeros(1, 4), 1e-9)


def test_mean_and_spread_of_the_log_ratio_at_each_position() -> None:
    moved = torch.where(MASK, MOVED, 0.0)[0]
    got = ratio.recentered(POLICY, OLD, MASK, lambda x: x)[0]
    scale = (got[3] - got[0]) / (moved[3] - moved[0])
    assert_close((got / scale)[0], moved[0] - tensor([-0.0375, 0.1500, 0.1333]))
    spread = tensor([0.2219, 0.1620, 0.1179])
    assert_close(scale, spread.mean() / spread, 1e-3)
    assert_close(got[0].exp(), [1.1092, 0.8135, 1.2668])


def test_the_linear_bound_lies_below_the_gain_that_it_bounds() -> None:
    rho, gain = tensor([0.25]).exp(), tensor([0.5252])
    assert_close(-surrogate.unclipped(rho, gain), [0.6744])
    assert_close(-surrogate.linear_bound(rho, tensor([0.25]), gain, 0.8, 1.2), [0.6565])


def test_chi_squared_is_not_the_plain_estimate() -> None:
    d = scores.over_reference(POLICY, REF, MASK)
    assert_close(d.exp(), [[1.2214, 0.9512, 1.3499, 1.0513]])
    loss = regularize.chi_squared(
        POLICY,
        REF,
        MASK,
        torch.ones(1, 4, dtype=F64),
        Normalizer(11.0, 4.0, 1.0),
        lambda x: x,
        chi_coef=1.0,
        chi_floor=1e-4,
        chi_limit=10.0,
    )
    assert_close(loss, 0.1843)
    assert_close(loss.square(), 0.0340)
    # mean(x) - 1, which a sample can make negative.
    assert_close(d.exp().mean() - 1, 0.1434)


def test_the_mean_that_splits_a_skewed_group() -> None:
    skewed = tensor([[0.2, 0.3, 0.4, 1.2]])
    assert_close(stats.group_mean(skewed), [[0.5250]])
    kept = select.balanced(skewed, VALID, torch.Generator().manual_seed(0))
    assert float(kept[0, :3].sum()) == 1 and float(kept[0, 3]) == 1


def test_spreads_of_a_group_and_of_a_flat_one() -> None:
    spreads = stats.group_std(torch.cat([REWARDS, FLAT]), VALID.expand(2, 4), 0)
    assert_close(spreads, [[0.3808], [0.0]])
    assert_close(stats.group_std(REWARDS, VALID, 1), [[0.4397]])


def test_prdp_without_its_clip_is_the_variance_of_what_is_not_predicted() -> None:
    draw = torch.Generator().manual_seed(4)
    policy, old, ref = torch.randn(3, 2, 5, 3, generator=draw, dtype=F64)
    rewards = torch.rand(2, 5, generator=draw, dtype=F64)
    mask = torch.ones(2, 5, 3, dtype=torch.bool)
    weights = pairs.half_square(rewards, torch.ones(2, 5, dtype=torch.bool))
    got = group_loss.reward_difference(
        policy, old, ref, mask, rewards, weights, beta=0.3, token_clip=1e9
    )
    drift = (policy - ref).sum(-1)
    assert_close(got, (0.3 * drift - rewards).var(1, correction=0), 1e-9)


def test_estimates_of_the_kl_on_samples_of_an_older_policy() -> None:
    """Weighted by the ratio, k1 and k3 have the same mean over the older policy's tokens."""
    draw = torch.Generator().manual_seed(5)
    policy, old, ref = torch.randn(3, 7, generator=draw, dtype=F64).log_softmax(1)
    weighted = regularize.kl_k3_weighted(policy, old, ref, kl_coef=1.0)
    divergence = (policy.exp() * (policy - ref)).sum()
    assert_close((old.exp() * weighted).sum(), divergence, 1e-12)
    rho = (policy - old).exp()
    k1 = regularize.kl_k1(policy, ref, kl_coef=1.0)
    assert_close((old.exp() * rho * k1).sum(), divergence, 1e-12)
    # Without the weight it is not the divergence of either.
    plain = (old.exp() * regularize.kl_k3(policy, ref, kl_coef=1.0)).sum()
    assert float((plain - divergence).abs()) > 0.05


def test_hundreds_of_steps_in_phases() -> None:
    """[grpo 200, dpo 50] three times are 750 steps."""
    schedule = preset("veripo_schedule", phase_steps=(200, 50))
    phases = [schedule.phase_at(step) for step in range(750)]
    assert (phases.count(0), phases.count(1)) == (600, 150)
    assert [phases[i] for i in (199, 200, 249, 250, 749)] == [0, 1, 1, 0, 1]


def test_the_group_of_the_toy_has_the_advantages_that_others_are_compared_with() -> None:
    ready = prepared(preset("grpo", eps=0.0), toy_batch())
    assert_close(ready.fields["advantages"][:, 0, :, 0], NORMALIZED, 1e-12)
    assert_close(NORMALIZED, [[-1.3131, -0.5252, 0.5252, 1.3131]])
