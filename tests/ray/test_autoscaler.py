"""Ray's own autoscaler adds a node for every rollout worker and takes all of them back.

Its "cloud" is Ray's fake provider: nodes are raylets on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.ray.conftest import ROOT, metrics
from tests.ray.test_job_submit import RAY, free_port

pytestmark = pytest.mark.ray
# Less than a rollout worker wants is left on the head beside the learner and the reward worker.
HEAD_CPUS, NODE_CPUS = 2, 1
WORKERS = 3
EMPTY = (
    "initialization_commands setup_commands head_setup_commands worker_setup_commands "
    "head_start_ray_commands worker_start_ray_commands cluster_synced_files"
)


def autoscaling(port: int) -> dict:
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "fake",
        "max_workers": WORKERS,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "head_node": {},
        "worker_nodes": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": HEAD_CPUS},
                "node_config": {},
                "max_workers": 0,
            },
            "rollout": {
                "resources": {"CPU": NODE_CPUS, "object_store_memory": 80 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": WORKERS,
            },
        },
        **{name: [] for name in EMPTY.split()},
    }


@pytest.fixture
def cluster():
    """A head that may add nodes; yields its address and the environment to join it."""
    # Socket paths have a length limit, which pytest's own folders come close to.
    folder = Path(tempfile.mkdtemp(prefix="rayrl-", dir="/tmp"))
    port = free_port()
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(autoscaling(port)))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--num-cpus={HEAD_CPUS}"]
    command += [f"--dashboard-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    command += ["--object-store-memory=100000000", f"--autoscaling-config={config}"]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"127.0.0.1:{port}"
    yield address, {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address}
    head.terminate()
    head.wait(timeout=60)
    # A node that the fake provider takes away leaves processes behind.
    subprocess.run(["pkill", "-KILL", "-f", f"{folder}/"])
    shutil.rmtree(folder, ignore_errors=True)


def join(address: str) -> None:
    for _ in range(180):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            return
        except ConnectionError:
            time.sleep(1)
    raise AssertionError(f"no Ray head at {address}")


def rollout_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes()) - 1


def test_nodes_come_for_the_workers_of_a_run_and_leave_after_it(
    cluster, small_job, tmp_path, monkeypatch
):
    address, environment = cluster
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    join(address)
    try:
        assert rollout_nodes() == 0
        flags = small_job(
            rollout__num_workers=WORKERS,
            rollout__min_workers=WORKERS,
            rollout__cpus=NODE_CPUS,
            learner__cpus=1.5,
            train__reward_cpus=0.25,
        )
        job = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "grpo_coco.py"), *flags],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        most = 0
        while job.poll() is None:
            most = max(most, rollout_nodes())
            time.sleep(0.5)
        output = job.communicate()[0]
        assert job.returncode == 0, output
        assert most == WORKERS
        rows = metrics(tmp_path / "run")
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
        assert {row["workers/rollout"] for row in rows[1:]} == {WORKERS}
        # Nothing that a worker left behind holds its node.
        deadline = time.monotonic() + 240
        while rollout_nodes() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert rollout_nodes() == 0
    finally:
        ray.shutdown()
