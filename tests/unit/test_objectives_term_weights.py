"""Weights under reward.terms, where an objective reads the single terms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from objectives_toy import CLIP, REWARDS, REWARDS_2, advantages_of, assert_close, tensor, toy_batch

from rayrl.config import Config
from rayrl.learner.batches import group_batch
from rayrl.learner.provided import check_objective
from rayrl.learner.replay import make_replay, read_replay
from rayrl.objectives import aggregate, group_loss, margins
from rayrl.objectives.batch import GroupBatch
from tests.unit.test_learner import batch, learner

BOTH = torch.cat([REWARDS, REWARDS_2])
__all__ = ["batch"]

LOGGED = {"cider_d": 1.0, "logged": 0.0}


def of_terms(weights: dict[str, float], **terms: torch.Tensor) -> GroupBatch:
    """Groups with these terms beside cider_d, and the weighted sum as rewards."""
    all_terms = {"cider_d": BOTH, **terms}
    rewards = torch.stack([weights.get(k, 1.0) * v for k, v in all_terms.items()]).sum(0)
    return replace(toy_batch(rewards), terms=all_terms, reward_weights=weights)


@pytest.mark.parametrize("name", ["gdpo", "mo_grpo", "ensemble_worst_case", "ensemble_uncertainty"])
def test_a_term_of_weight_0_is_only_logged(name: str) -> None:
    other = {"same": BOTH} if name == "ensemble_uncertainty" else {}
    alone = advantages_of(name, of_terms({}, **other))
    assert alone.abs().max() > 0.5
    assert_close(advantages_of(name, of_terms(LOGGED, logged=-BOTH, **other)), alone, 1e-9)


def test_one_score_has_no_variance() -> None:
    with pytest.raises(ValueError, match="mean_minus_variance wants two terms or more, got cider_"):
        advantages_of("ensemble_uncertainty", of_terms(LOGGED, logged=-BOTH))


@pytest.mark.parametrize("name", ["gdpo", "mo_grpo"])
def test_weights_are_those_of_the_configuration_but_for_explicit_ones(name: str) -> None:
    penalty = {"cider_d": 1.0, "long": -0.5}
    batch = of_terms(penalty, long=BOTH.flip(1))
    spelled = of_terms({}, long=BOTH.flip(1))
    want = advantages_of(name, spelled, term_weights=penalty)
    assert_close(advantages_of(name, batch), want, 1e-9)
    assert_close(advantages_of(name, batch, term_weights="long:-0.5"), want, 1e-9)
    other = advantages_of(name, batch, term_weights="long:2")
    assert_close(other, advantages_of(name, spelled, term_weights="long:2"), 1e-9)
    assert (other - want).abs().max() > 0.1


def test_factors_and_other_terms_of_weight_0_are_left_out_unless_named() -> None:
    terms = {"a": CLIP, "b": REWARDS, "c": tensor([[0.5, 0.5, 1.0, 1.0]])}
    weights = {"a": 0.0, "b": 0.0}
    assert_close(aggregate.product(terms, weights, main_term="b"), terms["b"] * terms["c"], 1e-12)
    harmonic = aggregate.harmonic_mean(terms, weights, main_term="b", main_share=0.5)
    two = {"b": REWARDS, "c": terms["c"]}
    assert_close(harmonic, aggregate.harmonic_mean(two, main_term="b", main_share=0.5), 1e-12)
    added = aggregate.with_multipliers(REWARDS, terms, multipliers={"a": 2.0})
    assert_close(added, REWARDS + 2 * CLIP, 1e-12)


def test_a_penalty_among_scores_is_refused() -> None:
    terms, weights = {"a": CLIP, "b": REWARDS}, {"a": -1.0}
    message = "reward term a has weight -1.0, and a penalty is none of its scores"
    with pytest.raises(ValueError, match=f"worst_of: {message}"):
        aggregate.worst_of(terms, weights)
    with pytest.raises(ValueError, match=f"product: {message}"):
        aggregate.product(terms, weights, main_term="b")


def test_the_margin_of_modpo_shares_by_the_weights() -> None:
    scores = torch.zeros(1, 4, dtype=torch.float64)
    terms = {"main": REWARDS, "a": CLIP, "b": REWARDS}

    def margin(weights: dict[str, float]) -> torch.Tensor:
        return margins.other_terms(
            scores, terms, weights, beta=0.1, main_term="main", main_weight=0.5
        )

    gap = CLIP[:, :, None] - CLIP[:, None]
    assert_close(margin({"b": 0.0}), -gap, 1e-12)
    assert_close(margin({"b": 0.0, "a": -2.0}), gap, 1e-12)
    assert_close(margin({"a": 0.0, "b": 0.0}), torch.zeros(1, 4, 4), 1e-12)


def test_terms_of_weight_0_have_no_head_and_penalties_one_that_lowers_them() -> None:
    mask = torch.ones(1, 4, 1, dtype=torch.bool)
    heads = tensor([[[[0.5]], [[0.0]], [[0.0]], [[0.0]]]])
    terms = {"logged": CLIP, "long": tensor([[0.0, 1.0, 2.0, 3.0]])}
    valid = torch.ones(1, 4, dtype=torch.bool)
    nothing = torch.zeros(1, 4, 1, dtype=torch.float64)

    def loss(weight: float) -> float:
        weights = {"logged": 0.0, "long": weight}
        return float(group_loss.heads(heads, nothing, mask, terms, valid, weights, beta=1.0))

    assert loss(-1.0) == pytest.approx(np.log1p(np.exp(-0.5)))
    assert loss(1.0) == pytest.approx(np.log1p(np.exp(0.5)))


def test_a_run_has_a_head_for_each_term_that_counts(tiny_folder, batch) -> None:
    given = replace(batch, terms={"a": batch.rewards, "logged": -batch.rewards})
    weights = {"logged": 0.0, "a": 1.0}
    subject = learner(tiny_folder, objective="mah_dpo_heads", reward_weights=weights)
    report = subject.update(given)
    assert report.metrics["objective/loss_policy"] == pytest.approx(np.log(2), rel=1e-5)
    assert subject.checkpoint().arrays["term_heads/down"].shape[0] == 1


def test_the_learner_hands_the_weights_to_the_objective(tiny_folder, batch) -> None:
    terms = {"a": batch.rewards, "logged": -batch.rewards}
    given = replace(batch, terms=terms)
    norms = [
        learner(tiny_folder, objective="gdpo", reward_weights=weights)
        .update(given)
        .metrics["learner/grad_norm"]
        for weights in ({"a": 1.0, "logged": 0.0}, {})
    ]
    assert norms[0] > 1e-3
    assert norms[1] < 1e-6


@pytest.mark.parametrize("known", [True, False])
def test_a_replay_keeps_the_weights_and_one_of_before_has_none(batch, known: bool) -> None:
    weights = {"cider_d": 0.5}
    replay = make_replay(
        batch,
        group_batch(batch, "cpu", weights),
        step=0,
        images=[0],
        state={"step": 0},
        problem="none",
        model_files={},
        heads={},
    )
    meta = {k: v for k, v in replay.meta.items() if known or k != "reward_weights"}
    _, again, _ = read_replay(replace(replay, meta=meta))
    assert again.reward_weights == (weights if known else {})
    assert again.select([1]).reward_weights == again.reward_weights


def test_a_rehearsal_knows_the_weights() -> None:
    def config(weight: float) -> Config:
        terms = {"cider_d": 1.0, "bleu": weight}
        return Config.model_validate(
            {"objective": {"preset": "ensemble_worst_case"}, "reward": {"terms": terms}}
        )

    check_objective(config(0.0))
    with pytest.raises(ValueError, match="worst_of: reward term bleu has weight -1"):
        check_objective(config(-1.0))
    heads = {"objective": {"preset": "mah_dpo_heads"}}
    check_objective(Config.model_validate({**heads, "reward": {"terms": config(0).reward.terms}}))
