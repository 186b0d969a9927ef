"""Objectives that need more than captions and scores, through the actors."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import yaml

from rayrl import commands
from rayrl.rewards.term import Judged
from rayrl.types import Prompt
from tests.ray.conftest import metrics

pytestmark = pytest.mark.ray


def dislikes_articles(captions: list[str], prompt: Prompt) -> Judged:
    """Calls every "a" wrong."""
    spans = tuple(tuple(m.span() for m in re.finditer(r"\ba\b", text)) for text in captions)
    scores = np.array([-float(len(some)) for some in spans])
    return Judged(scores, versions=(7,) * len(captions), wrong_spans=spans)


@pytest.mark.parametrize(
    ("preset", "reports"),
    [
        # A critic, cross-entropy on the references and a reference model.
        ("ppo_max", "objective/critic_explained_variance"),
        # What a judge says of single words, by the way of its versions.
        ("capo_wrong_spans", "objective/mixed_reward_versions"),
    ],
)
def test_a_job_brings_what_its_objective_needs(small_job, run_here, tmp_path, preset, reports):
    judge = {
        "kind": "function",
        "path": "tests.ray.test_needs_job:dislikes_articles",
        "weight": 0.1,
    }
    config = {
        "reward": {"terms": {"cider_d": 1.0, "judge": judge}, "constraints": {"judge": ">= -1"}}
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(config))
    flags = small_job(
        "--config", str(file), train__steps=2, train__images_per_step=4, objective__preset=preset
    )
    done = run_here(commands.grpo, flags)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")[1:]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
        assert reports in row
        assert 0 <= row["objective/self_cider"] <= 1
        assert row["groups/dropped"] == 0
        assert row["learner/skipped"] == 0
    assert sum(row["learner/grad_norm"] for row in rows) > 0
