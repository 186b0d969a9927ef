"""Stage 1 with Ray Train takes the steps that a trainer alone takes, whatever is lost on it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file

from rayrl import cli, commands
from rayrl.actors import room
from rayrl.checkpoint import list_checkpoints
from rayrl.data import load_split
from rayrl.data.order import prompt_indices
from rayrl.learner.xe import XeTrainer
from rayrl.receipt import read_receipt
from tests.ray.conftest import ROOT
from tests.ray.fault_kinds import children

pytestmark = pytest.mark.ray
STEPS = 40
WORKER = "ray::RayTrainWorker"


@pytest.fixture
def undisturbed(tmp_path):
    """The model that one trainer without Ray ends with."""

    def train(config):
        trainer = XeTrainer(
            config.model.path,
            model=config.model,
            config=config.xe,
            instruction=config.data.instruction,
            max_tokens=config.sampling.max_tokens,
            seed=0,
        )
        data, size = load_split(config.data, "train"), config.xe.images_per_step
        for step in range(STEPS):
            prompts = [data[i] for _, i in prompt_indices(step, size, len(data), 0)]
            images, references = [p.image for p in prompts], [p.references for p in prompts]
            trainer.step(images, references, step / STEPS)
        trainer.save(tmp_path / "undisturbed")
        return tmp_path / "undisturbed"

    return train


class Killer(threading.Thread):
    """SIGKILL of this process's Ray Train worker, once it has made a further snapshot."""

    def __init__(self, place, after: int) -> None:
        super().__init__(daemon=True)
        self._place, self._after = place, after
        self.killed_after = 0

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while not self.killed_after and time.monotonic() < deadline:
            newest = max(list_checkpoints(self._place), default=0)
            victims = children(os.getpid(), WORKER) if newest > self._after else []
            if victims:
                os.kill(victims[0], signal.SIGKILL)
                self.killed_after = newest
            time.sleep(0.01)


def test_a_lost_driver_and_a_lost_worker_cost_the_steps_since_the_last_snapshot(
    small_job, spoken_folder, run_here, environment, undisturbed, caplog, tmp_path
):
    # Two workers, which share the images of a step.
    sizes = {"xe__steps": STEPS, "xe__images_per_step": 8, "xe__captions_per_image": 2}
    flags = small_job(**sizes, xe__snapshot_every=2, xe__num_workers=2)
    place = tmp_path / "run" / "stage1" / "training"
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "xe_coco.py"), *flags],
        env={**environment, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list_checkpoints(place):
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[0]
        time.sleep(0.01)
    driver.kill()
    driver.communicate()
    while children(os.getpid(), WORKER):
        assert time.monotonic() < deadline, "a worker outlives its driver"
        time.sleep(0.01)
    left = max(list_checkpoints(place))

    killer = Killer(place, after=left)
    killer.start()
    done = run_here(commands.xe, flags)
    killer.join()
    assert done.returncode == 0, done.stderr
    assert f"stage 1 goes on after step {left}\n" in done.stdout
    assert left < killer.killed_after < STEPS
    assert "cross-entropy goes on after step" in caplog.text

    config = cli.load(tmp_path / "run" / "config.yaml")
    final = tmp_path / "run" / "stage1" / "final"
    got, want, start = (
        load_file(folder / "model.safetensors")
        for folder in (final, undisturbed(config), spoken_folder)
    )
    moved, off = (
        sum(float((one[name] - want[name]).square().sum()) for name in want) ** 0.5
        for one in (start, got)
    )
    assert off < 1e-3 * moved
    snapshots = read_receipt(final.parent)["snapshots"]
    assert [one["steps"] for one in snapshots] == list(range(0, STEPS + 1, 2))
    seconds = [one["seconds"] for one in snapshots]
    assert seconds == sorted(seconds)
    # What only who goes on needs is gone.
    assert not list((tmp_path / "run" / "stage1").rglob("trainer"))


def test_a_worker_that_fails_by_itself_ends_stage_1_at_once(
    small_job, spoken_folder, run_here, caplog, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(spoken_folder, model)
    (model / "model.safetensors").unlink()
    done = run_here(commands.xe, small_job(model__path=model, xe__steps=2))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("xe_coco.py: failed: cross-entropy failed: OSError: ")
    assert "model.safetensors" in last
    # No other worker was started in its place.
    assert "goes on after step" not in caplog.text


def test_without_room_for_its_workers_stage_1_says_what_is_missing_and_stops(
    small_job, run_here, monkeypatch, caplog
):
    monkeypatch.setattr(room, "SAY_EVERY_S", 0.5)
    done = run_here(
        commands.xe,
        small_job(xe__steps=2, learner__cpus=50, rollout__start_timeout_s=2.0),
    )
    missing = (
        "waiting for room for cross-entropy's 1 worker(s) and their readers: "
        "want 50.5 CPU; of the cluster's 8, "
    )
    assert done.returncode == 1
    assert f"xe_coco.py: failed: gave up {missing}" in done.stderr
    assert any(message.startswith(missing) for message in caplog.messages)
    assert {place["state"] for place in placement_group_table().values()} <= {"REMOVED"}
