"""A scorer that is retrained on the run's own groups."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from objectives_toy import F64, FLAT, REWARDS, VALID, assert_close, prepared, tensor, toy_batch

from rayrl.checkpoint import join_state, split_state
from rayrl.objectives import preset, scorer, shaping

SIZES = {"scorer_passes": 100, "scorer_memory": 512}
STATE = "aggregate self_trained_scorer"


def groups(p: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [P,4,3] and rewards [P,4] that are linear in them, plus what the image brings."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(p, 4, 3, generator=draw, dtype=F64)
    images = 5 * torch.randn(p, 1, generator=draw, dtype=F64)
    return features, features @ tensor([1.0, -2.0, 0.5]) + images


def test_a_step_along_one_pair_gives_it_a_margin_of_two() -> None:
    pair = tensor([[0.6, -0.8]]) * 3
    one, two = (scorer.pairwise_logistic(pair, passes) for passes in (1, 2))
    assert_close(pair @ one, [2.0], 1e-12)
    # Then 4 sigmoid(-2) more.
    assert_close(pair @ two, [2 + 4 / (1 + math.exp(2.0))], 1e-12)
    assert_close(scorer.pairwise_logistic(pair, 0), [0.0, 0.0])
    assert_close(scorer.pairwise_logistic(pair[:0], 5), [0.0, 0.0])


def test_every_pass_descends() -> None:
    pairs = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    losses = [
        float(torch.nn.functional.softplus(-(pairs @ scorer.pairwise_logistic(pairs, n))).mean())
        for n in range(8)
    ]
    assert losses[0] == pytest.approx(math.log(2))
    assert losses == sorted(losses, reverse=True)
    # At the minimum the gradient is gone.
    weights = scorer.pairwise_logistic(pairs, 5000)
    assert_close(torch.sigmoid(-(pairs @ weights)) @ pairs, torch.zeros(4), 1e-6)


def test_a_caption_that_only_the_scorer_likes_is_a_hard_negative() -> None:
    scores, true = tensor([[0.9, 0.4], [0.1, 0.7]]), tensor([[0.2, 0.8], [0.0, 1.0]])
    everyone = torch.ones(2, 2, dtype=torch.bool)
    assert scorer.hard_negatives(scores, true, everyone).tolist() == [True, False]
    # Of captions that do not exist neither the score nor the reward counts.
    one = torch.tensor([[False, True], [False, True]])
    assert scorer.hard_negatives(scores, true, one).tolist() == [False, False]


def test_it_is_first_trained_on_the_best_and_the_worst_of_each_group() -> None:
    features, _ = groups(1)
    scores, state = shaping.self_trained_scorer(
        REWARDS, features, VALID, {}, scorer_passes=1, scorer_memory=9
    )
    pair = features[0, 3] - features[0, 0]
    assert_close(state["pairs"][0], pair, 1e-6)
    assert_close(scores, features @ pair * (2 / pair.square().sum()), 1e-12)
    assert float(scores[0, 3] - scores[0, 0]) == pytest.approx(2.0)


def test_its_mistakes_are_added_against_the_truly_best_caption() -> None:
    features = tensor([[[1.0, 0.0], [0.0, 0.5], [0.0, 0.0], [0.2, 1.0]]])
    state = {"pairs": np.array([[2.0, 0.0]])}
    # By the first feature alone caption 0 is best; truly it is caption 3, and 0 the worst.
    scores, new = shaping.self_trained_scorer(REWARDS, features, VALID, state, **SIZES)
    assert int(scores.argmax()) == 0
    assert_close(new["pairs"], [[2.0, 0.0], [-0.8, 1.0]], 1e-6)
    _, short = shaping.self_trained_scorer(
        REWARDS, features, VALID, state, **{**SIZES, "scorer_memory": 1}
    )
    assert_close(short["pairs"], [[-0.8, 1.0]], 1e-6)
    # The next step's scorer has learned from it, and makes the mistake no more.
    _, third = shaping.self_trained_scorer(REWARDS, features, VALID, short, **SIZES)
    assert_close(third["pairs"], short["pairs"])


def test_it_learns_what_a_reward_is_from_few_groups() -> None:
    state: dict[str, Any] = {}
    for step in range(20):
        features, rewards = groups(4, seed=step)
        everyone = torch.ones(4, 4, dtype=torch.bool)
        scores, state = shaping.self_trained_scorer(rewards, features, everyone, state, **SIZES)
    unseen, rewards = groups(200, seed=99)
    scores = unseen @ scorer.pairwise_logistic(torch.tensor(state["pairs"]).double(), 100)
    better = rewards[:, :, None] > rewards[:, None]
    agree = better & (scores[:, :, None] > scores[:, None])
    assert agree.sum() / better.sum() > 0.9


def test_flat_groups_teach_nothing_and_a_scorer_without_pairs_tells_nothing_apart() -> None:
    features, _ = groups(1)
    scores, state = shaping.self_trained_scorer(FLAT, features, VALID, {}, **SIZES)
    assert scores.abs().max() == 0
    assert state["pairs"].shape == (0, 3)
    learned = shaping.self_trained_scorer(REWARDS, features, VALID, state, **SIZES)[1]
    assert len(learned["pairs"]) >= 1


def test_a_frozen_scorer_is_grpo_on_its_scores() -> None:
    features, _ = groups(1)
    pairs = np.array([[1.0, -2.0, 0.5]])
    objective = preset("reward_ranker")
    state = {**objective.initial_state(), STATE: {"pairs": pairs}}
    batch = toy_batch(caption_features=features)
    _, ready = objective.prepare(state, batch)
    scores = features @ scorer.pairwise_logistic(torch.tensor(pairs), 100)
    assert_close(ready.fields["rewards"], scores, 1e-12)
    plain = prepared(preset("grpo_deepseekmath", kl_coef=0.0), replace(batch, rewards=scores))
    assert_close(ready.fields["advantages"], plain.fields["advantages"], 1e-12)


def test_scores_of_captions_do_not_depend_on_their_order() -> None:
    features, rewards = groups(3)
    everyone = torch.ones(3, 4, dtype=torch.bool)
    order = [2, 0, 3, 1]
    scores, state = shaping.self_trained_scorer(rewards, features, everyone, {}, **SIZES)
    moved, other = shaping.self_trained_scorer(
        rewards[:, order], features[:, order], everyone, {}, **SIZES
    )
    assert_close(moved, scores[:, order], 1e-12)
    np.testing.assert_array_equal(other["pairs"], state["pairs"])


def test_the_training_set_survives_a_checkpoint() -> None:
    objective = preset("reward_ranker")
    features, rewards = groups(6)
    batch = toy_batch(rewards, caption_features=features)
    state, _ = objective.prepare(objective.initial_state(), batch)
    arrays, values = split_state(state)
    assert list(arrays) == ["objective/aggregate self_trained_scorer/pairs"]
    other = replace(batch, rewards=-batch.rewards)
    one = objective.prepare(state, other)
    again = objective.prepare(join_state(values, arrays), other)
    assert_close(one[1].fields["advantages"], again[1].fields["advantages"], 0.0)
    np.testing.assert_array_equal(one[0][STATE]["pairs"], again[0][STATE]["pairs"])
