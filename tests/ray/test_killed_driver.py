"""The driver is killed at random moments, and its run goes on where the last checkpoint is."""

from __future__ import annotations

import random

import pytest

from tests.ray.fake_run import STEPS, differences
from tests.ray.fault_kinds import Drivers

pytestmark = pytest.mark.ray
KILLS = 3


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    with Drivers(tmp_path_factory.mktemp("faults")) as drivers:
        yield drivers


def test_no_prompt_is_trained_twice_and_none_is_skipped(drivers, tmp_path):
    """Of a synchronous run; test_grpo_job.py kills the driver of another one."""
    (tmp_path / "quiet").mkdir()
    quiet = drivers.finish(tmp_path / "quiet", 0)
    folder, chance = tmp_path / "killed", random.Random(0)
    folder.mkdir()
    for kill in range(KILLS):
        # Further than the last one, and not at its end.
        drivers.kill(folder, 0, (kill + 1) * (STEPS - 2) // (KILLS + 1), chance)
    done = drivers.finish(folder, 0)
    assert differences(done, quiet) == []
