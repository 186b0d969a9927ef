"""Micro-batches by images and by tokens: what goes together, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from rayrl.config import Config, LearnerConfig
from rayrl.learner.batches import Tokens, micro_batches, rank_micro_batches
from rayrl.learner.parallel import Ranks
from rayrl.learner.provided import provided
from tests.unit.test_learner import batch, learner

__all__ = ["batch"]


def parts(tokens, **config):
    return list(micro_batches(range(len(tokens)), tokens, LearnerConfig(**config)))


def of_captions(counts):
    return [Tokens(0, count) for count in counts]


def test_images_are_counted_where_tokens_are_not():
    assert parts(of_captions([9] * 5), micro_batch_images=2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("tokens", "budget", "want"),
    [
        ([10, 30, 10, 30, 10], 60, [[1, 3], [0, 2, 4]]),
        # Rows are as long as the longest: 3 x 30 is above 80, though 30 + 30 + 10 is not.
        ([30, 30, 10], 80, [[0, 1], [2]]),
        # What is longer than the budget goes alone.
        ([10, 100, 10], 20, [[1], [0, 2]]),
        ([5] * 6, 1000, [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_images_of_similar_length_fill_a_budget_of_tokens(tokens, budget, want):
    got = parts(of_captions(tokens), micro_batch_tokens=budget, micro_batch_images=3)
    assert got == want
    assert all(len(part) == 1 or len(part) * max(tokens[i] for i in part) <= budget for part in got)


def test_rows_have_room_for_the_longest_prompt_and_for_the_longest_captions():
    """A row of both would be 100 + 90 long, though neither image has more than 120."""
    tokens = [Tokens(100, 20), Tokens(20, 90), Tokens(95, 20)]
    assert parts(tokens, micro_batch_tokens=240, micro_batch_images=3) == [[0, 2], [1]]
    assert parts(tokens, micro_batch_tokens=570, micro_batch_images=3) == [[0, 2, 1]]


def test_ranks_have_equally_many_whatever_the_lengths():
    config, tokens = LearnerConfig(micro_batch_tokens=40), of_captions([40, 40, 10, 10])
    one, other = (
        rank_micro_batches(range(4), tokens, config, Ranks(rank=r, size=2)) for r in range(2)
    )
    assert one == [([0], True), ([1], True)]
    assert other == [([2, 3], True), ([0], False)]


def gradient(subject, batch):
    subject.update(batch)
    return torch.cat([p.grad.flatten().double() for p in subject._named.values()])


@pytest.mark.parametrize("config", [{"micro_batch_images": 4}, {"micro_batch_tokens": 100}])
@pytest.mark.parametrize("objective", ["grpo", "dr_grpo"])
def test_gradients_add_up_to_the_full_batchs(tiny_folder, batch, config, objective):
    options = {"objective": objective, "grad_clip": 1e9}
    want = gradient(learner(tiny_folder, **options), batch)
    subject = learner(tiny_folder, **options, **config)
    tokens = subject.policy.inputs(batch).tokens
    assert len(set(tokens)) > 3
    assert 1 < len(parts(tokens, **config)) < 6
    assert (gradient(subject, batch) - want).norm() / want.norm() < 1e-6


def test_statistics_of_a_minibatch_are_not_promised_for_a_budget_of_tokens():
    assert "whole_minibatch" in provided(Config())
    assert "whole_minibatch" not in provided(
        Config(learner=LearnerConfig(micro_batch_tokens=10**6))
    )
