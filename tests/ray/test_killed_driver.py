"""The driver is killed at random moments, and its run goes on where the last checkpoint is."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest
import ray

from tests.ray.conftest import ROOT
from tests.ray.fake_run import STEPS, Done, assert_same, run

pytestmark = pytest.mark.ray
KILLS = 3


def drive(address: str, folder: Path, faults: str, staleness: int, result: Path) -> None:
    """A driver: from the last checkpoint to the end, if it is let."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "RAYRL_TEST_FAULTS": faults}},
    )
    with pytest.MonkeyPatch.context() as patch:
        done = run(folder, patch, staleness=staleness, save_every=3, num_workers=2)
    partial = result.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(done))
    partial.rename(result)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts drivers in processes of their own, on one Ray."""
    address = ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False
    ).address_info["address"]
    # One process imports, and every driver is a copy of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ray.test_killed_driver"])
    faults = str(tmp_path_factory.mktemp("faults"))

    def driver(folder: Path, staleness: int):
        result = folder / "done.pickle"
        process = context.Process(target=drive, args=(address, folder, faults, staleness, result))
        process.start()
        return process, result

    yield driver
    ray.shutdown()


def finish(process, result: Path) -> Done:
    process.join(120)
    assert process.exitcode == 0
    return pickle.loads(result.read_bytes())


@pytest.mark.parametrize("staleness", [0, 1])
def test_no_prompt_is_trained_twice_and_none_is_skipped(start, tmp_path, staleness):
    (tmp_path / "quiet").mkdir()
    quiet = finish(*start(tmp_path / "quiet", staleness))
    folder, chance = tmp_path / "killed", random.Random(staleness)
    folder.mkdir()
    metrics = folder / "metrics.jsonl"
    for kill in range(KILLS):
        process, _ = start(folder, staleness)
        # Further than the last one, and not at its end.
        want = (kill + 1) * (STEPS - 2) // (KILLS + 1)
        while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < want:
            assert process.is_alive(), process.exitcode
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    done = finish(*start(folder, staleness))
    if staleness == 0:
        assert_same(done, quiet)
    # After a resume the first batches are sampled with newer weights than ahead of the learner.
    assert done.trained == quiet.trained
    assert [row["step"] for row in done.rows] == list(range(1, STEPS + 1))
