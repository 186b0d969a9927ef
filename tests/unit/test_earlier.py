"""Captions of earlier checkpoints join the group of their image, and survive a resume."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rayrl.batch import make_batch
from rayrl.checkpoint import load_checkpoint, save_checkpoint
from rayrl.learner.batches import group_batch
from rayrl.learner.earlier import EarlierCaptions
from tests.unit.test_learner import batch, learner, parameters
from tests.unit.test_types_and_batch import completion, scored

__all__ = ["batch"]

FIRST = make_batch(
    [
        scored("a", [completion([1, 2, 3], version=4), completion([7])], [1.0, 2.0]),
        scored("b", [completion([4], version=4, finish="length"), completion([5])], [3.0, 4.0]),
    ]
)
SECOND = make_batch(
    [
        scored("b", [completion([8, 9], version=5), completion([8])], [0.5, 0.6]),
        scored("c", [completion([6], version=5), completion([6])], [0.7, 0.8]),
    ]
)


def test_an_image_that_comes_again_meets_its_first_caption():
    store = EarlierCaptions()
    fresh = store.joined(FIRST)
    assert fresh.shape == (2, 3, 3)
    assert not fresh.fields["earlier"].any()
    assert fresh.valid.tolist() == [[True, True, False]] * 2
    again = store.joined(SECOND)
    assert again.fields["earlier"].tolist() == [[False, False, True], [False, False, False]]
    assert again.valid.tolist() == [[True, True, True], [True, True, False]]
    assert again.token_ids[0].tolist() == [[8, 9], [8, 0], [4, 0]]
    assert again.mask[0].sum(-1).tolist() == [2, 1, 1]
    assert again.rewards[0].tolist() == pytest.approx([0.5, 0.6, 3.0])
    assert again.terms["cider_d"][0, 2] == 3.0
    assert again.weight_versions[0].tolist() == [5, 3, 4]
    assert again.truncated[0].tolist() == [False, False, True]
    assert again.rollout_logprobs[0, 2].tolist() == [-1.0, 0.0]
    assert group_batch(again, "cpu").valid.tolist() == again.valid.tolist()
    # The caption that is there now is the earlier one of the next visit.
    third = store.joined(SECOND)
    assert third.token_ids[0, 2].tolist() == [8, 9]


def test_what_is_known_of_the_image_stays_known():
    fields = {"reference_rewards": np.ones((2, 3)), "judge_ok": np.ones((2, 2), bool)}
    joined = EarlierCaptions().joined(replace(FIRST, fields=fields))
    assert joined.fields.keys() == {"reference_rewards", "earlier"}


def test_longer_captions_of_before_widen_the_batch():
    store = EarlierCaptions()
    store.joined(FIRST)
    short = make_batch([scored("a", [completion([9]), completion([8])], [1.0, 1.5])])
    joined = store.joined(short)
    assert joined.token_ids.tolist() == [[[9, 0, 0], [8, 0, 0], [1, 2, 3]]]
    assert joined.rollout_logprobs[0, 2].tolist() == [-1.0, -2.0, -3.0]


def test_a_caption_of_other_reward_terms_is_forgotten():
    """As after a resume with a term more: its reward is not theirs."""
    store = EarlierCaptions()
    store.joined(FIRST)
    more = replace(SECOND, terms={**SECOND.terms, "length": np.zeros((2, 2), np.float32)})
    joined = store.joined(more)
    assert joined.terms.keys() == {"cider_d", "length"}
    assert not joined.fields["earlier"].any() and not joined.valid[:, 2].any()
    # What is there now has both, of which a run may need one alone.
    assert store.joined(more).fields["earlier"].any()
    assert store.joined(SECOND).fields["earlier"].any()


def test_what_is_remembered_is_restored():
    one, other = EarlierCaptions(), EarlierCaptions()
    one.joined(FIRST)
    other.restore(one.arrays())
    a, b = one.joined(SECOND), other.joined(SECOND)
    for name in ("token_ids", "mask", "rollout_logprobs", "rewards", "truncated"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert a.terms["cider_d"].tolist() == b.terms["cider_d"].tolist()
    other.restore({})
    assert not other.joined(SECOND).fields["earlier"].any()


def test_the_first_visit_teaches_nothing_and_the_second_does(tiny_folder, batch):
    subject = learner(tiny_folder, objective="seppo_earlier", schedule="constant")
    first = subject.update(batch)
    assert first.metrics["learner/grad_norm"] == 0
    assert first.advantages.shape == batch.rewards.shape
    second = subject.update(replace(batch, rewards=1 - batch.rewards))
    # Policy and reference still agree, so every margin is 0.
    assert second.metrics["objective/loss_policy"] == pytest.approx(np.log(2), rel=1e-5)
    assert second.metrics["learner/grad_norm"] > 1e-3


def test_a_resumed_run_meets_the_same_captions(tiny_folder, batch, tmp_path):
    straight, resumed = (learner(tiny_folder, objective="seppo_earlier") for _ in range(2))
    straight.update(batch)
    save_checkpoint(tmp_path, straight.checkpoint(), keep=1)
    resumed.restore(load_checkpoint(tmp_path / "latest"))
    for subject in (straight, resumed):
        for _ in range(2):
            subject.update(batch)
    for name, value in parameters(straight).items():
        assert np.array_equal(parameters(resumed)[name], value), name


def test_the_earlier_caption_comes_right_after_a_group_that_is_smaller():
    store = EarlierCaptions()
    store.joined(FIRST)
    ragged = make_batch(
        [
            scored("a", [completion([9])], [1.0]),
            scored("b", [completion([5]), completion([6])], [1.0, 2.0]),
        ]
    )
    joined = store.joined(ragged)
    assert joined.valid.tolist() == [[True, True, False], [True, True, True]]
    assert joined.fields["earlier"].tolist() == [[False, True, False], [False, False, True]]
    assert joined.token_ids[0].tolist() == [[9, 0, 0], [1, 2, 3], [0, 0, 0]]
