"""docs/observability.md lists what a run writes, under the names that it writes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from test_rounds import completion, prompt_at, scored

from rayrl.learner.means import short_names
from rayrl.objectives.control import adaptive_entropy, adaptive_kl
from rayrl.outline import outline
from rayrl.planning import Drawn, Request
from rayrl.rewards.config import NOT_TERMS
from rayrl.rollout_metrics import group_metrics
from tests.metric_names import listed, not_listed


def test_the_page_lists_what_the_driver_says_of_groups_and_nothing_else():
    group = scored(Request(slot=0, prompt=prompt_at(0), size=2, forced=(5,)), [1.0, 2.0])
    forced = replace(completion([5, 6]), num_forced=1)
    group = replace(
        group,
        group=replace(group.group, completions=(forced, completion([7, 8]))),
        greedy_reward=0.5,
        fields={"similarity": np.eye(2)},
    )
    drawn = Drawn(step=0, total_steps=1, group_size=2, prompts=(), groups=())
    written = {**group_metrics(outline([group]), 0), **drawn.metrics()}
    starts = ("reward/", "length/", "captions/", "staleness/", "groups/", "rounds/")
    want = {name for name, _ in listed() if name.startswith(starts)} | {"objective/self_cider"}
    assert {name.replace("cider_d", "<term>") for name in written} == want
    # No term may have the name of one of them.
    assert {f"reward/{name}" for name in NOT_TERMS} | {"reward/<term>"} == {
        name for name in want if name.startswith("reward/")
    }


def test_controllers_read_the_names_that_the_page_gives_for_them():
    pairs = dict(listed())
    assert short_names(dict.fromkeys(pairs.values(), 1.0)) == dict.fromkeys(pairs, 1.0)
    assert adaptive_kl({pairs["kl"]: 0.1}, {"kl_coef": 1.0}, kl_target=0.1, kl_horizon=1.0)
    held, _ = adaptive_entropy(
        {pairs["entropy"]: 0.1}, {"entropy_coef": 1.0}, {}, entropy_target=0.1, entropy_step=0.5
    )
    assert held["coefficients"]["entropy_coef"] == 1.5


def test_a_name_that_no_run_writes_is_not_on_the_page():
    names = ["kl", "reward/judge", "reward_seconds/judge", "objective/loss_kl_k3"]
    assert not_listed(names) == []
    assert not_listed(["objective/kl_k3", "objective/clip_low", "klx"]) == [
        "objective/kl_k3",
        "objective/clip_low",
        "klx",
    ]
