"""The recommended objectives, and those that sample in several rounds, through the actors: two
steps each of a small job."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from rayrl import commands
from rayrl.types import Prompt
from tests.ray.conftest import metrics

pytestmark = pytest.mark.ray

RECOMMENDED = ("grpo", "scst", "nsc", "dr_grpo", "dapo")
# By preset, how many of the 6 groups of 4 captions a step has at least asked for again, and the
# captions that it samples at least.
ROUNDS = {
    "dapo": (1, 28),
    "ghpo_reference_hints": (1, 28),
    "xrpo_novelty": (1, 30),
    "dynamic_tree_rpo": (12, 24),
}
# Compares with captions of the stage-1 model.
COMPARES = "a_star_po"
SETTINGS = {"dynamic_tree_rpo": {"tree_depths": "3"}}


def some_fail(captions: list[str], prompt: Prompt) -> list[float]:
    """By image below 0 for all captions, 0.5 for all, or above 0."""
    rewards = [0.1 + zlib.crc32(caption.encode()) % 7 for caption in captions]
    kind = zlib.crc32(prompt.prompt_id.encode()) % 3
    return [[-reward, 0.5, reward][kind] for reward in rewards]


@pytest.mark.parametrize("name", dict.fromkeys((*RECOMMENDED, *ROUNDS, COMPARES)))
def test_two_steps_of_each(small_job, spoken_folder, run_here, tmp_path, name):
    term = {"kind": "function", "path": "tests.ray.test_presets_job:some_fail"}
    rewards = tmp_path / "rewards.yaml"
    rewards.write_text(yaml.safe_dump({"reward": {"terms": {"made_up": term}}}))
    flags = small_job(
        *("--config", str(rewards)),
        objective__preset=name,
        objective__set=json.dumps(SETTINGS.get(name, {})),
        train__steps=2,
    )
    done = run_here(commands.grpo, flags)
    assert done.returncode == 0, done.stderr
    rows, latest = metrics(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "latest"
    check_steps(rows)
    if name in ROUNDS:
        check_rounds(name, rows[1:])
    if name == COMPARES:
        check_stage1_rewards(latest / "trainer" / "arrays-1.safetensors")
    if name == "grpo":
        # Without a planner a step is one round.
        assert {row["rounds/captions"] for row in rows[1:]} == {24}
    before = load_file(spoken_folder / "model.safetensors")
    after = load_file(latest / "model.safetensors")
    assert max(float(np.abs(before[key] - after[key]).max()) for key in before) > 1e-5


def check_stage1_rewards(file: Path) -> None:
    """Those of every image of the two steps, 8 captions each, by the run's own reward."""
    arrays = load_file(file)
    images = arrays["reference_rewards/images"].tobytes().decode().split("\n")
    rewards = arrays["reference_rewards/rewards"]
    assert rewards.shape == (12, 8) and len(set(images)) == 12
    for image, row in zip(images, rewards, strict=True):
        kind = zlib.crc32(image.encode()) % 3
        assert [(row < 0).all(), (row == 0.5).all(), (row > 0).all()][kind], image
    assert np.ptp(rewards, axis=1).max() > 0


def check_steps(rows: list[dict]) -> None:
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert not [key for key, value in row.items() if value is None]
        assert row["groups/dropped"] == row["staleness/max"] == 0
        assert abs(row["mismatch_kl"]) < 1e-6


def check_rounds(name: str, rows: list[dict]) -> None:
    again, captions = ROUNDS[name]
    assert sum(row["rounds/asked_again"] for row in rows) >= again
    assert max(row["rounds/captions"] for row in rows) >= captions
    assert max(row["rounds/count"] for row in rows) >= 2
    forced = [row["length/forced"] for row in rows if "length/forced" in row]
    assert bool(forced) == (name == "ghpo_reference_hints")
