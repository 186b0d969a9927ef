"""The wire types refuse what cannot be, by name; groups become one padded batch."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rayrl.batch import make_batch
from rayrl.types import Completion, Prompt, RolloutGroup, ScoredGroup


def prompt(name="coco/1"):
    return Prompt(prompt_id=name, image=b"png", text="Describe.", references=("a dog",))


def completion(ids, *, version=3, finish="stop", offset=0.0):
    return Completion(
        token_ids=np.array(ids, np.int32),
        logprobs=-np.arange(1, len(ids) + 1, dtype=np.float32) - offset,
        text=f"caption {ids}",
        finish_reason=finish,
        weight_version=version,
    )


def scored(name, groups, rewards, greedy=None):
    return ScoredGroup(
        group=RolloutGroup(
            prompt=prompt(name),
            prompt_token_ids=np.array([1, 2], np.int32),
            completions=tuple(groups),
            group_size=len(groups),
        ),
        terms={"cider_d": np.array(rewards, np.float32)},
        rewards=np.array(rewards, np.float32),
        greedy_reward=greedy,
    )


def test_a_batch_pads_with_a_mask_from_lengths_not_from_ids():
    # Token 0 is a real token here: a mask from pad ids would lose it.
    batch = make_batch(
        [
            scored("a", [completion([0, 5, 0]), completion([7], finish="length")], [1.0, 2.0]),
            scored("b", [completion([1, 2]), completion([3, 0], version=2)], [0.5, 0.25]),
        ]
    )
    assert batch.shape == (2, 2, 3)
    assert batch.mask.astype(int).tolist() == [[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 0]]]
    assert batch.token_ids[0, 0].tolist() == [0, 5, 0]
    assert batch.rollout_logprobs[1, 1].tolist() == [-1.0, -2.0, 0.0]
    assert batch.truncated.tolist() == [[False, True], [False, False]]
    assert batch.weight_versions.tolist() == [[3, 3], [3, 2]]
    assert batch.rewards.tolist() == [[1.0, 2.0], [0.5, 0.25]]
    assert batch.greedy_rewards is None


def test_greedy_rewards_are_carried_when_every_group_has_one():
    groups = [
        scored(n, [completion([1]), completion([2])], [1, 2], g)
        for n, g in zip("ab", (0.5, 0.75), strict=True)
    ]
    assert make_batch(groups).greedy_rewards.tolist() == [0.5, 0.75]


def test_smaller_groups_end_in_rows_without_a_caption():
    groups = [
        scored("a", [completion([1]), completion([2, 4])], [1, 2]),
        scored("small", [completion([3], finish="length")], [5]),
    ]
    batch = make_batch(groups)
    assert batch.valid.tolist() == [[True, True], [True, False]]
    assert batch.mask.astype(int).tolist() == [[[1, 0], [1, 1]], [[1, 0], [0, 0]]]
    assert batch.rewards.tolist() == [[1, 2], [5, 0]]
    assert batch.terms["cider_d"].tolist() == [[1, 2], [5, 0]]
    assert batch.truncated.tolist() == [[False, False], [True, False]]


def test_rows_without_a_token_are_refused_before_a_caption():
    batch = make_batch([scored("a", [completion([1]), completion([2])], [1, 2])])
    hole = batch.mask.copy()
    hole[0, 0] = False
    with pytest.raises(ValueError, match="prompt a has a completion without tokens"):
        replace(batch, mask=hole)
    with pytest.raises(ValueError, match="prompt a has a completion without tokens"):
        replace(batch, mask=np.zeros_like(batch.mask))


def test_forced_tokens_travel_from_completion_to_batch():
    hinted = replace(completion([7, 8, 9]), num_forced=2)
    group = pickle.loads(pickle.dumps(scored("a", [hinted, completion([1])], [1, 2])))
    assert group.group.completions[0].num_forced == 2
    batch = make_batch([group])
    assert batch.forced.astype(int).tolist() == [[[1, 1, 0], [0, 0, 0]]]
    assert make_batch([scored("a", [completion([1])], [1])]).forced is None
    with pytest.raises(ValueError, match="prompt a has a forced token beyond a caption's end"):
        replace(batch, forced=~batch.mask)
    with pytest.raises(ValueError, match=r"forced of shape \(1, 2\), want \(1, 2, 3\)"):
        replace(batch, forced=batch.mask.any(-1))


def test_no_group_at_all_is_refused():
    with pytest.raises(ValueError, match="every group of the step was dropped"):
        make_batch([])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prompt(prompt_id="x", image=b"i", text="t", references=()), "prompt x: no refer"),
        (lambda: Prompt(prompt_id="x", image=b"", text="t", references=("a",)), "x: empty image"),
        (lambda: completion([]), "want \\[T\\] with T >= 1"),
        (lambda: completion([1], finish="abort"), "finish_reason 'abort'"),
        (lambda: completion([1], offset=np.inf), "log-prob -inf at token 0"),
        (lambda: scored("p", [completion([1])], [np.nan]), "prompt p: cider_d \\[nan\\]"),
        (lambda: scored("p", [completion([1])], [1.0, 2.0]), "shape \\(2,\\), want \\(1,\\)"),
        (
            lambda: replace(completion([1, 2]), num_forced=2),
            "2 of 2 tokens forced, want at least one that was sampled",
        ),
        (
            lambda: RolloutGroup(
                prompt=prompt("q"),
                prompt_token_ids=np.array([1], np.int32),
                completions=(completion([1]),),
                group_size=2,
            ),
            "prompt q: 1 completions, want 2",
        ),
        (
            lambda: Completion(
                token_ids=np.array([1, 2], np.int32),
                logprobs=np.zeros(1, np.float32),
                text="t",
                finish_reason="stop",
                weight_version=0,
            ),
            "log-probs for 2 tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
