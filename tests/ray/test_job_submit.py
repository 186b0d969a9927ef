"""`ray job submit --working-dir . -- python jobs/grpo_coco.py` on a local cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.ray.conftest import ROOT

pytestmark = pytest.mark.ray
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster():
    """A Ray head of its own; yields the environment that `ray job submit` needs."""
    # Socket paths have a length limit, which pytest's own folders come close to.
    folder = tempfile.mkdtemp(prefix="rayrl-", dir="/tmp")
    dashboard = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=6"]
    # Every port is its own: another Ray on the machine holds the usual ones.
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--temp-dir={folder}", "--disable-usage-stats"]
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    yield {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    head.terminate()
    head.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def submit(flags, environment, timeout=400):
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "jobs/grpo_coco.py"]
    # A head takes a while until it answers, and a while more until its agent takes jobs.
    not_yet = ("Failed to connect to Ray", "No available agent", "Connection refused")
    for _ in range(60):
        done = subprocess.run(
            [*command, *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if not any(text in done.stdout + done.stderr for text in not_yet):
            return done
        time.sleep(2)
    raise AssertionError(f"no Ray head: {done.stderr}")


def test_a_submitted_job_joins_the_cluster_and_succeeds(cluster, small_job, tmp_path):
    done = submit(small_job(train__steps=2), cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2


def test_a_failing_job_exits_non_zero_with_its_reason_in_the_last_lines(cluster, small_job):
    done = submit(small_job(data__source="parquet", data__path="nowhere.parquet"), cluster)
    assert done.returncode != 0
    last = "\n".join(done.stdout.strip().splitlines()[-12:])
    assert "grpo_coco.py: failed:" in last and "nowhere.parquet" in last
