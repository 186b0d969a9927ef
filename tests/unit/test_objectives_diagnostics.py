"""What an update reports, by hand on the small group."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objectives_toy import (
    F64,
    FLAT,
    MASK,
    MOVED,
    OLD,
    POLICY,
    REWARDS,
    TinyPolicy,
    loss_of,
    prepared,
    synthetic_batch,
    toy_batch,
)

from rayrl.objectives import preset
from rayrl.objectives.batch import GroupBatch
from rayrl.objectives.plan import part


def report(
    name: str, batch: GroupBatch, policy: torch.Tensor = POLICY, **graph: torch.Tensor
) -> dict[str, float]:
    objective = preset(name)
    ready = prepared(objective, batch)
    out = objective.loss(ready, policy.expand_as(batch.mask), ready.normalizer(), **graph)
    return {
        key.removeprefix("objective/"): float(total) / float(weight)
        for key, (total, weight) in out.metrics.items()
        if float(weight)
    }


def test_shares_of_groups_and_captions() -> None:
    truncated = torch.zeros(2, 4, dtype=torch.bool)
    truncated[0, 1] = True
    got = report("dapo", toy_batch(torch.cat([REWARDS, FLAT]), truncated=truncated))
    assert got["flat_groups"] == 0.5
    assert got["truncated"] == 1 / 8
    assert got["kept"] == 3 / 8


def test_ratios_and_clipping_on_both_sides() -> None:
    got = report("grpo", toy_batch())
    ratio = MOVED.exp()[MASK]
    assert got["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert got["ratio_deviation"] == pytest.approx(0.19, abs=5e-5)
    # Ratios above 1.2 with A > 0: 1.2840 and 1.4918; below 0.8 with A < 0: none of 0.8187.
    assert got["clip_high"] == pytest.approx(2 / 11)
    assert got["clip_low"] == 0.0
    # Of three tokens two are the first half, of two tokens one is.
    first = [0.10, -0.05, -0.20, 0.10, 0.25, -0.30, 0.40]
    second = [0.30, 0.05, 0.15, 0.05]
    for key, moves in (("first", first), ("second", second)):
        mean = sum(map(math.exp, moves)) / len(moves)
        assert got[f"ratio_{key}_half"] == pytest.approx(mean)


def test_positive_over_negative_mass() -> None:
    a = (REWARDS - 0.7)[..., None]
    mass = (MOVED.exp() * a)[MASK.expand(1, 4, 3)]
    want = float(mass.clamp(min=0).sum() / -mass.clamp(max=0).sum())
    assert report("dr_grpo", toy_batch())["positive_negative_ratio"] == pytest.approx(want)


def test_divergences_from_the_old_policy_the_reference_and_the_engine() -> None:
    got = report("grpo", toy_batch(rollout_logprobs=OLD - 0.1))
    moved = MOVED[MASK]
    assert got["step_kl_k1"] == pytest.approx(-float(moved.mean()))
    assert got["step_kl_k3"] == pytest.approx(float((moved.exp() - 1 - moved).mean()))
    assert got["kl_k1"] == pytest.approx(0.5 / 11)
    assert got["mismatch_kl"] == pytest.approx(math.exp(0.1) - 1.1)
    assert got["effective_sample_size"] == pytest.approx(1.0)
    assert got["loss_kl_k3"] == pytest.approx(0.04 * got["kl_k3"])
    assert got["loss_policy"] + got["loss_kl_k3"] == pytest.approx(
        loss_of("grpo", toy_batch(rollout_logprobs=OLD - 0.1))
    )


def test_effective_sample_size_of_unequal_weights() -> None:
    """One token with weight 3 and ten with weight 1: (13)^2 / (11 * 19)."""
    rollout = OLD.clone()
    rollout[0, 0, 0] -= math.log(3)
    got = report("nsc", toy_batch(rollout_logprobs=rollout))
    assert got["effective_sample_size"] == pytest.approx(169 / 209)


def test_ranking_accuracy_of_policy_and_reference() -> None:
    """Mean log-probs -1.05, -0.75, -0.75, -0.8167 rank three of the six pairs as the rewards do;
    those of the reference are -1.1167, -0.7333, -0.9, -0.8333 and rank four so."""
    got = report("nsc", toy_batch())
    assert got["ranking_accuracy_policy"] == pytest.approx(3 / 6)
    assert got["ranking_accuracy_ref"] == pytest.approx(4 / 6)


def test_both_sides_of_the_pairs() -> None:
    got = report("online_dpo", toy_batch())
    assert got["better_over_ref"] == pytest.approx(0.05)
    assert got["worse_over_ref"] == pytest.approx(0.2)


def test_entropy_by_the_tokens_that_were_sampled() -> None:
    # 10.2 nats over 11 tokens; without the first two of the first caption 8.7 over 9.
    assert report("grpo", toy_batch())["entropy_sampled"] == pytest.approx(10.2 / 11)
    forced = torch.zeros(1, 4, 3, dtype=torch.bool)
    forced[0, 0, :2] = True
    got = report("ghpo_reference_hints", toy_batch(forced=forced))
    assert got["entropy_sampled"] == pytest.approx(8.7 / 9)


def test_how_often_a_scorer_ranks_as_the_reward_does() -> None:
    # Trained on the best and the worst caption, whose margin is 2; the third is like the worst, and
    # the second like the best: of six pairs it has (4,1), (4,3) and (2,1) right.
    features = torch.tensor([[[0.0], [1.0], [0.0], [1.0]]], dtype=F64)
    got = report("reward_ranker", toy_batch(caption_features=features))
    assert got["scorer_accuracy"] == pytest.approx(3 / 6)
    assert "scorer_accuracy" not in report("grpo", toy_batch())


def test_entropy_diversity_and_reward_versions() -> None:
    similarity = torch.stack([torch.eye(4, dtype=F64), torch.ones(4, 4, dtype=F64)])
    versions = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 2]])
    batch = toy_batch(torch.cat([REWARDS, FLAT]), similarity=similarity, reward_versions=versions)
    got = report("grpo_entropy", batch, entropy=torch.full((2, 4, 3), 0.7, dtype=F64))
    assert got["entropy"] == pytest.approx(0.7)
    assert got["self_cider"] == pytest.approx(0.5)
    assert got["mixed_reward_versions"] == 0.5


def drop_first(rewards: torch.Tensor) -> torch.Tensor:
    keep = torch.ones_like(rewards)
    keep[:, 0] = 0.0
    return keep


@pytest.mark.parametrize(
    "name",
    [
        "grpo",
        "gspo",
        "online_dpo",
        "pacs",
        "reg_grpo",
        "brain_posterior",
        "disco_ratio",
        "prdp_reward_difference",
        "chi_squared_regularized",
        "mah_dpo_heads",
    ],
)
def test_dropped_captions_have_no_gradient(name: str) -> None:
    policy = TinyPolicy(4)
    batch = synthetic_batch(policy)
    objective = preset(name, select=part(drop_first))
    ready = prepared(objective, batch)
    x = (batch.old_logprobs + 0.1 * batch.mask).requires_grad_()
    graph = policy.graph(batch, objective.needs)
    if "head_logprobs" in graph:
        graph["head_logprobs"] = torch.stack([x, 0.5 * x], -1)
    loss = objective.loss(ready, x, ready.normalizer(), **graph).loss
    loss.backward()
    assert x.grad[:, 0].abs().max() == 0.0
    assert x.grad[:, 1:].abs().max() > 0.0


@pytest.mark.parametrize("name", ["online_dpo", "brain_posterior", "prdp_reward_difference"])
def test_the_reward_of_a_dropped_caption_does_not_matter(name: str) -> None:
    policy = TinyPolicy(4)
    batch = synthetic_batch(policy)
    objective = preset(name, select=part(drop_first))
    other = replace(batch, rewards=batch.rewards.index_fill(1, torch.tensor([0]), -9.0))
    x = batch.old_logprobs + 0.1 * batch.mask
    assert loss_of(objective, other, x) == pytest.approx(loss_of(objective, batch, x))
