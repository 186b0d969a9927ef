"""Parts of a step travel without their prompts and come back as they were; outlines say of them
what the groups would."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rayrl.outline import Here, outline, together
from rayrl.packing import Joined, Rows, Runs, Table, pack, unpack
from rayrl.rewards.score import Dropped
from rayrl.rollout_metrics import group_metrics
from rayrl.shares import Parts, Sampled, Scored
from rayrl.types import Completion, Prompt, RolloutGroup, ScoredGroup

LOST = Dropped("c", "no answer")


def caption(ids, *, text="a dog", finish="stop", version=3, forced=0) -> Completion:
    return Completion(
        token_ids=np.array(ids, np.int32),
        logprobs=-np.array(ids, np.float32) / 7,
        text=text,
        finish_reason=finish,
        weight_version=version,
        num_forced=forced,
    )


def scored(name: str, captions, rewards, **more) -> ScoredGroup:
    group = RolloutGroup(
        prompt=Prompt(prompt_id=name, image=name.encode(), text="Describe.", references=(name,)),
        prompt_token_ids=np.arange(len(name) + 1, dtype=np.int32),
        completions=tuple(captions),
        group_size=len(captions),
        greedy=more.pop("greedy", None),
    )
    rewards = np.array(rewards, np.float32)
    return ScoredGroup(group=group, terms={"cider_d": rewards / 2}, rewards=rewards, **more)


def results() -> list[ScoredGroup | Dropped]:
    """Two groups of different sizes, and one between them that was dropped."""
    first = scored(
        "a",
        [caption([5, 6, 7]), caption([8], finish="length", version=2)],
        [0.1, 0.3],
        greedy=caption([9, 9]),
        greedy_reward=0.25,
        fields={"similarity": np.eye(2), "judge_ok": np.array([True, False])},
        wrong_spans=(((0, 1),), ()),
        prefix_rewards=(np.zeros(2, np.float32), np.ones(1, np.float32)),
    )
    captions = [caption([1, 2], text="a"), caption([3], text="b"), caption([4, 4, 4, 4])]
    return [
        first,
        LOST,
        scored("bb", [replace(captions[0], num_forced=1), *captions[1:]], [1, 2, 6]),
    ]


def part_of(some, *, seconds=0.0, term_seconds=None) -> Scored:
    """A part with these results.  The group that was dropped had been sampled too."""
    lost = scored("c", [caption([1])], [0]).group
    groups = [lost if isinstance(one, Dropped) else one.group for one in some]
    return Scored.of(Sampled.of(groups, seconds), some, term_seconds or {})


def prompts_of(some) -> list[Prompt]:
    lost = Prompt(prompt_id="c", image=b"c", text="Describe.", references=("c",))
    return [lost if isinstance(one, Dropped) else one.group.prompt for one in some]


def same(one, other) -> bool:
    """Equal in every field, arrays bit for bit."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__slots__"):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__slots__)
    return type(one) is type(other) and one == other


def test_columns_of_each_kind():
    one, other = results()[0], results()[2]
    columns = pack([one, other], without=("fields",))
    assert "fields" not in columns
    assert isinstance(columns["rewards"], Joined)
    assert columns["rewards"].bounds == (0, 2, 5)
    assert isinstance(columns["terms"], Table)
    assert isinstance(columns["group"], Rows)
    assert isinstance(columns["group"].columns["completions"], Runs)
    # Only one of the two has them.
    assert columns["greedy_reward"] == [0.25, None]
    assert isinstance(columns["prefix_rewards"], list)
    back = unpack(ScoredGroup, columns, fields=[one.fields, other.fields])
    assert same(back[0], one) and same(back[1], other)


def test_arrays_of_more_axes_are_joined_where_they_fit():
    square, flat = np.eye(2), np.zeros((3, 2))
    joined = pack([Here((square,)), Here((flat,))])["results"]
    assert isinstance(joined, Runs) and joined.column.values.shape == (5, 2)
    assert isinstance(pack([Here((square,)), Here((np.zeros((2, 3)),))])["results"], list)


def test_nothing_comes_back_as_nothing():
    assert Sampled.of([], 0.0).unpacked([]) == []
    assert Scored.of(Sampled.of([], 0.0), [], {}).unpacked([]) == []


def test_a_part_arrives_as_it_was_sent_and_holds_no_prompt():
    sent = results()
    data = pickle.dumps(part_of(sent, seconds=1.5, term_seconds={"cider_d": 0.5}), 5)
    assert b"Describe." not in data
    got = pickle.loads(data)
    assert (got.sampled.seconds, got.term_seconds) == (1.5, {"cider_d": 0.5})
    back = got.unpacked(prompts_of(sent))
    assert back[1] == LOST
    assert same(back[0], sent[0]) and same(back[2], sent[2])
    groups = [sent[0].group, sent[2].group]
    sampled = pickle.loads(pickle.dumps(Sampled.of(groups, 2.0), 5))
    again = sampled.unpacked([group.prompt for group in groups])
    assert sampled.seconds == 2.0
    assert all(map(same, again, groups))


def test_prompts_of_another_part_are_refused():
    part = part_of(results())
    with pytest.raises(ValueError, match="zip"):
        part.unpacked(prompts_of(results())[:2])


def test_an_outline_says_what_the_groups_say():
    seen = outline(results())
    assert seen.sizes.tolist() == [2, 3]
    assert seen.rewards.tolist() == pytest.approx([0.1, 0.3, 1, 2, 6])
    assert seen.terms["cider_d"].tolist() == pytest.approx([0.05, 0.15, 0.5, 1, 3])
    assert seen.lengths.tolist() == [3, 1, 2, 1, 4]
    assert seen.weight_versions.tolist() == [3, 2, 3, 3, 3]
    assert seen.dropped == (LOST,)
    metrics = group_metrics(seen, 4)
    assert metrics == pytest.approx(
        {
            "reward/mean": 9.4 / 5,
            # Of 0.1 and 0.3 it is 0.1; of 1, 2 and 6 the root of 14 / 3.
            "reward/std_in_group": (0.1 + (14 / 3) ** 0.5) / 2,
            "reward/best_in_group": (0.3 + 6) / 2,
            "reward/cider_d": 4.7 / 5,
            "reward/greedy": 0.25,
            "length/mean": 11 / 5,
            "length/truncated": 1 / 5,
            "length/forced": 1 / 5,
            "captions/unique_in_group": (1 / 2 + 1) / 2,
            # One caption was sampled with version 2, the others with 3.
            "staleness/mean": 6 / 5,
            "staleness/max": 2,
            # Two captions that share nothing.
            "objective/self_cider": 1.0,
        }
    )


def test_a_step_in_parts_has_the_metrics_of_the_whole_bit_for_bit():
    rng = np.random.default_rng(0)

    def group(i: int) -> ScoredGroup:
        captions = [caption(rng.integers(1, 9, rng.integers(1, 9))) for _ in range(4)]
        kernel = np.eye(4) * 0.75 + 0.25
        return scored(f"p{i}", captions, rng.normal(size=4), fields={"similarity": kernel})

    whole = [group(i) for i in range(9)]
    parts = [whole[:2], [LOST], whole[2:7], whole[7:]]
    in_parts = Parts(
        prompts=[prompts_of(part) for part in parts],
        scored=[part_of(part) for part in parts],
        references=[],
    )
    assert group_metrics(in_parts.outline, 5) == group_metrics(outline(whole), 5)
    assert in_parts.outline.dropped == (LOST,)
    got = [result for result in in_parts.all() if result != LOST]
    assert all(map(same, got, whole)) and len(got) == 9
    assert len(in_parts.all()) == 10
    first = in_parts.first(3)
    assert [one.group.prompt.prompt_id for one in first] == ["p0", "p1", "p2"]


def test_a_step_without_a_group_has_an_empty_outline():
    seen = together([outline([LOST]), outline([LOST, LOST])])
    assert seen.dropped == (LOST,) * 3
    assert (seen.sizes.size, seen.rewards.size, seen.terms) == (0, 0, {})


def test_the_number_of_arrays_does_not_grow_with_the_part():
    counts = []
    for size in (1, 16):
        buffers: list = []
        part = part_of([results()[2]] * size)
        pickle.dumps(part, protocol=5, buffer_callback=buffers.append)
        counts.append(len(buffers))
    assert counts[0] == counts[1]
