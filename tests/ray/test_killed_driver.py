"""The driver is killed at random moments, and its run goes on where the last checkpoint is."""

from __future__ import annotations

import random

import pytest

from tests.ray.fake_run import STEPS, differences, undisturbed
from tests.ray.fault_kinds import Drivers

pytestmark = pytest.mark.ray
KILLS = 3


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    with Drivers(tmp_path_factory.mktemp("faults")) as drivers:
        yield drivers


@pytest.mark.parametrize("staleness", [0, 1])
def test_no_prompt_is_trained_twice_and_none_is_skipped(drivers, tmp_path, staleness):
    quiet, chance = undisturbed(staleness), random.Random(staleness)
    for kill in range(KILLS):
        # Further than the last one, and not at its end.
        drivers.kill(tmp_path, staleness, (kill + 1) * (STEPS - 2) // (KILLS + 1), chance)
    done = drivers.finish(tmp_path, staleness)
    # After a resume the first batches are sampled with newer weights than ahead of the learner.
    assert differences(done, quiet, weights=staleness == 0) == []
