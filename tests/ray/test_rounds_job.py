"""Steps of several rounds on a local Ray: refilled, resumed, disturbed."""

from __future__ import annotations

import json
import zlib

import pytest
import yaml

from rayrl import commands
from rayrl.types import Prompt
from tests.ray.conftest import metrics, weights, without_time

pytestmark = pytest.mark.ray


def some_flat(captions: list[str], prompt: Prompt) -> list[float]:
    """The same reward for all captions of every third image or so."""
    if zlib.crc32(prompt.prompt_id.encode()) % 3 == 0:
        return [0.5] * len(captions)
    return [zlib.crc32(caption.encode()) % 7 / 7 for caption in captions]


@pytest.fixture
def rewards(tmp_path):
    """Writes a configuration with one reward term, a function of this file."""

    def write(name: str) -> list[str]:
        file = tmp_path / f"{name}.yaml"
        term = {"kind": "function", "path": f"tests.ray.test_rounds_job:{name}"}
        file.write_text(yaml.safe_dump({"reward": {"terms": {"made_up": term}}}))
        return ["--config", str(file)]

    return write


def rounds_of(folder) -> dict:
    """Where a run is in the order of its prompts."""
    meta = folder / "checkpoints" / "latest" / "trainer" / "meta.json"
    return json.loads(meta.read_text())["rounds"]


def test_refilled_steps_resume_exactly(small_job, rewards, run_here, tmp_path):
    flags = {
        "objective__preset": "dapo",
        "objective__set": json.dumps({"refill_rounds": 6}),
        "learner__schedule": "constant",
    }
    extra = rewards("some_flat")
    for name, steps, resume in (
        ("straight", 4, []),
        ("broken", 2, []),
        ("broken", 4, ["--resume"]),
    ):
        job = small_job(*extra, *resume, run_folder=tmp_path / name, train__steps=steps, **flags)
        done = run_here(commands.grpo, job)
        assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "straight")[1:]
    assert sum(row["rounds/asked_again"] for row in rows) > 0
    # Every step is full of groups that teach something.
    assert all(row["objective/flat_groups"] == 0 for row in rows)
    assert all(row["groups/dropped"] == 0 for row in rows)
    taken = sum(6 + row["rounds/asked_again"] for row in rows)
    captions = sum(row["rounds/captions"] for row in rows)
    assert rounds_of(tmp_path / "straight")["next"] == taken == captions / 4
    assert rounds_of(tmp_path / "broken") == rounds_of(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    one, other = (metrics(tmp_path / name) for name in ("straight", "broken"))
    assert without_time(one) == without_time(other)
