"""Rewards of captions of the stage-1 model: sampled once for each image, joined to its groups."""

from __future__ import annotations

import numpy as np
import pytest
from test_rounds import flat, groups_of, prompt_at, rounds, scored

from rayrl import reference_rewards
from rayrl.config import Config
from rayrl.engine.base import request_seed
from rayrl.objectives import preset
from rayrl.outline import Here
from rayrl.planning import Request
from rayrl.reference_rewards import ReferenceRewards, scored_needs
from rayrl.rewards.config import RewardConfig
from rayrl.rewards.score import Dropped

CONFIG = Config.model_validate({"train": {"images_per_step": 3}, "seed": 7})


def reward_of(request: Request) -> list[float]:
    """Different for each image and caption."""
    image = int(request.prompt.prompt_id[1:])
    return [image + i / 10 for i in range(request.size)]


class Fleet:
    """Samples at once; remembers what it was asked, and how many batches were on their way."""

    def __init__(self, dropped=()):
        self.dropped = dropped
        self.asked: list[list[Request]] = []
        self.shown: list[tuple[int, str]] = []
        self.waiting, self.most = 0, 0

    def show(self, version, weights):
        self.shown.append((version, weights))

    def submit(self, step, version, requests):
        assert (step, version) == (-1, 0)
        self.asked.append(list(requests))
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        return list(requests)

    def wait_rollouts(self, pending):
        pass

    def collect(self, pending):
        self.waiting -= 1
        results = [
            Dropped(r.prompt.prompt_id, "the judge was ill")
            if r.prompt.prompt_id in self.dropped
            else scored(r, reward_of(r))
            for r in pending
        ]
        return Here(results)


@pytest.fixture(autouse=True)
def stage1(monkeypatch, tmp_path):
    """The weights of a folder are its name here."""
    monkeypatch.setattr(reference_rewards, "_weights", lambda folder, model: folder.name)
    return tmp_path / "stage1"


def sample(subject, fleet, prompts, stage1, config=CONFIG):
    said = []
    subject.sample(fleet, iter(prompts), stage1, config, said.append)
    return said


def test_every_image_is_sampled_once_by_the_stage_1_model(stage1):
    subject, fleet = ReferenceRewards(size=4, seed=7), Fleet()
    said = sample(subject, fleet, map(prompt_at, range(8)), stage1)
    assert fleet.shown == [(0, "stage1")]
    assert [[r.prompt.prompt_id for r in batch] for batch in fleet.asked] == [
        ["p0", "p1", "p2"],
        ["p3", "p4", "p5"],
        ["p6", "p7"],
    ]
    # The next batch is on its way while one is waited for, and no more.
    assert fleet.most == 2
    assert {r.size for batch in fleet.asked for r in batch} == {4}
    seeds = [r.seed for batch in fleet.asked for r in batch]
    assert seeds[0] == request_seed(7, -1, "p0") != request_seed(7, 0, "p0")
    assert len(set(seeds)) == 8
    assert "4 captions" in said[0] and "8 images; 0" in said[1]


def test_groups_get_the_rewards_of_their_image(stage1):
    subject = ReferenceRewards(size=4, seed=7)
    sample(subject, Fleet(), map(prompt_at, range(3)), stage1)
    group = scored(Request(slot=0, prompt=prompt_at(2), size=2), [0.5, 0.6])
    lost = Dropped("p1", "no answer")
    joined, same = subject.joined(Here([group, lost])).all()
    np.testing.assert_allclose(joined.fields["reference_rewards"], [2.0, 2.1, 2.2, 2.3])
    assert joined.rewards is group.rewards and same is lost


def test_an_image_whose_captions_could_not_be_scored_is_dropped_with_the_reason(stage1):
    subject = ReferenceRewards(size=4, seed=7)
    said = sample(subject, Fleet(dropped=["p1"]), map(prompt_at, range(3)), stage1)
    assert "2 images; 1 could not be scored" in said[1]
    groups = [scored(Request(slot=0, prompt=prompt_at(i), size=2), [0.5, 0.6]) for i in (1, 5)]
    one, other = subject.joined(Here(groups)).all()
    assert one == Dropped("p1", "no rewards of the stage-1 model's captions: the judge was ill")
    assert other == Dropped(
        "p5", "no rewards of the stage-1 model's captions: they were not sampled"
    )


def test_a_resumed_run_samples_only_what_is_missing(stage1):
    first = ReferenceRewards(size=4, seed=7)
    sample(first, Fleet(dropped=["p1"]), map(prompt_at, range(3)), stage1)
    again = ReferenceRewards(size=4, seed=7)
    again.restore(first.arrays())
    fleet = Fleet()
    sample(again, fleet, map(prompt_at, range(4)), stage1)
    assert [[r.prompt.prompt_id for r in batch] for batch in fleet.asked] == [["p1", "p3"]]
    idle = Fleet()
    assert sample(again, idle, map(prompt_at, range(4)), stage1) == []
    assert idle.shown == [] and idle.asked == []
    straight = ReferenceRewards(size=4, seed=7)
    sample(straight, Fleet(), map(prompt_at, range(4)), stage1)
    for i in range(4):
        group = scored(Request(slot=0, prompt=prompt_at(i), size=1), [0.5])
        (one,), (other,) = (some.joined(Here([group])).all() for some in (again, straight))
        np.testing.assert_array_equal(
            one.fields["reference_rewards"], other.fields["reference_rewards"]
        )


DOCUMENTS = CONFIG.model_copy(
    update={
        "reward": RewardConfig(df="batch"),
        "train": CONFIG.train.model_copy(update={"images_per_step": 4}),
    }
)


@pytest.mark.parametrize(
    ("images", "a_step", "sizes"),
    [
        (8, 4, [4, 4]),
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (5, 4, [5]),
        (3, 4, [3]),
        (5, 2, [2, 3]),
        (3, 2, [3]),
    ],
)
def test_no_batch_is_too_small_for_its_document_frequencies(stage1, images, a_step, sizes):
    subject, fleet = ReferenceRewards(size=4, seed=7), Fleet()
    train = DOCUMENTS.train.model_copy(update={"images_per_step": a_step})
    config = DOCUMENTS.model_copy(update={"train": train})
    sample(subject, fleet, map(prompt_at, range(images)), stage1, config)
    assert [len(batch) for batch in fleet.asked] == sizes
    asked = [r.prompt.prompt_id for batch in fleet.asked for r in batch]
    assert asked == [f"p{i}" for i in range(images)]


def test_a_single_image_that_is_missing_takes_others_along_and_changes_none(stage1):
    first = ReferenceRewards(size=4, seed=7)
    sample(first, Fleet(dropped=["p1"]), map(prompt_at, range(9)), stage1, DOCUMENTS)
    kept = first.arrays()["reference_rewards/rewards"].copy()
    fleet = Fleet()
    sample(first, fleet, map(prompt_at, range(9)), stage1, DOCUMENTS)
    assert [[r.prompt.prompt_id for r in batch] for batch in fleet.asked] == [
        ["p1", "p0", "p2", "p3"]
    ]
    first.add([scored(fleet.asked[0][1], [9.0] * 4)])
    assert first.arrays()["reference_rewards/rewards"][:-1].tolist() == kept.tolist()
    idle = Fleet()
    assert sample(first, idle, map(prompt_at, range(9)), stage1, DOCUMENTS) == []


def test_another_number_of_captions_is_refused(stage1):
    first = ReferenceRewards(size=4, seed=7)
    assert first.arrays() == {}
    sample(first, Fleet(), [prompt_at(0)], stage1)
    with pytest.raises(ValueError, match=r"reference_samples 8: the checkpoint .* of 4 captions"):
        ReferenceRewards(size=8).restore(first.arrays())


def test_an_objective_that_does_not_compare_asks_for_nothing(stage1):
    for config, needs in (
        (CONFIG, preset("grpo").needs),
        (
            Config.model_validate({"objective": {"sources": {"reference_samples": 0}}}),
            preset("a_star_po").needs,
        ),
    ):
        subject, fleet = ReferenceRewards.of_run(config, needs), Fleet()
        sample(subject, fleet, [prompt_at(0)], stage1)
        assert fleet.shown == [] and subject.arrays() == {}
        group = scored(Request(slot=0, prompt=prompt_at(0), size=2), [0.5, 0.6])
        results = Here([group])
        assert subject.joined(results) is results
    of_run = ReferenceRewards.of_run(CONFIG, preset("infalign_ctrl").needs)
    assert (of_run.size, of_run.seed) == (8, 7)


def test_the_references_are_scored_only_in_their_place():
    needs = {"reference_rewards", "similarity"}
    sources = Config().objective.sources
    assert scored_needs(needs, sources) == {"similarity"}
    assert scored_needs(needs, sources.model_copy(update={"reference_samples": 0})) == needs


@pytest.mark.parametrize(
    ("objective", "data", "count"),
    # 10 steps of 3 images; a step that refills may take any.
    [("grpo", 1000, 30), ("grpo", 20, 20), ("dapo", 1000, 1000), ("veripo_schedule", 1000, 30)],
)
def test_the_prompts_of_a_run(objective, data, count):
    names = [p.prompt_id for p in rounds(objective, num_prompts=data).prompts()]
    assert names == [f"p{i}" for i in range(count)]


def test_what_joins_a_group_in_a_later_round_keeps_the_images_rewards(stage1):
    subject = ReferenceRewards(size=3, seed=7)
    sample(subject, Fleet(), map(prompt_at, range(3)), stage1)
    steps = rounds("xrpo_novelty", group_size=4, seed=7)
    results = [scored(r, reward_of(r)) for r in steps.begin(0)]
    more = steps.go_on(0, subject.joined(Here(results)))
    assert more
    assert not steps.go_on(0, subject.joined(Here([scored(r, flat(r)) for r in more])))
    for i, group in enumerate(groups_of(steps.complete(0))):
        np.testing.assert_allclose(group.fields["reference_rewards"], [i, i + 0.1, i + 0.2])
