"""`ray job submit --working-dir . -- python jobs/grpo_coco.py` on a local cluster."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.ray.conftest import ROOT, metrics

pytestmark = pytest.mark.ray
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster():
    """A Ray head of its own that asks for a token; yields the environment that `ray job submit`
    needs, in which PORT_OF_METRICS is where Prometheus would scrape."""
    # Socket paths have a length limit, which pytest's own folders come close to.
    folder = tempfile.mkdtemp(prefix="rayrl-", dir="/tmp")
    dashboard = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": folder}
    environment.pop("RAY_ADDRESS", None)
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PORT_OF_METRICS"] = str(free_port())
    environment["RAY_metrics_report_interval_ms"] = "500"
    command = [RAY, "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=6"]
    # Every port is its own: another Ray on the machine holds the usual ones.
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--temp-dir={folder}", "--disable-usage-stats"]
    command += [f"--metrics-export-port={environment['PORT_OF_METRICS']}"]
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


class Scraper(threading.Thread):
    """Reads the metrics endpoint as Prometheus does, until told to stop."""

    def __init__(self, port: str) -> None:
        super().__init__(daemon=True)
        self._url = f"http://127.0.0.1:{port}/metrics"
        self.seen: dict[str, set[float]] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            try:
                with urllib.request.urlopen(self._url, timeout=5) as answer:
                    lines = answer.read().decode().splitlines()
            except OSError:
                continue
            for line in lines:
                if line.startswith("ray_rayrl_"):
                    series, _, value = line.rpartition(" ")
                    self.seen.setdefault(series, set()).add(float(value))

    def values(self, name: str, *labels: str) -> set[float]:
        """Of the series with that name and all of ``labels``."""
        found = [
            values
            for series, values in self.seen.items()
            if series.partition("{")[0] == name and all(label in series for label in labels)
        ]
        return set().union(*found)


def test_a_submitted_job_joins_the_cluster_and_prometheus_sees_it(cluster, small_job, tmp_path):
    scraper = Scraper(cluster["PORT_OF_METRICS"])
    scraper.start()
    done = submit(small_job(train__steps=4), cluster)
    scraper.stop.set()
    scraper.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 4
    rows = metrics(tmp_path / "run")
    logged = {row["captions_per_second"] for row in rows[1:]}
    seen = scraper.values("ray_rayrl_captions_per_second", 'run="run"')
    assert seen and seen <= logged
    assert scraper.values("ray_rayrl_step") & {1.0, 2.0, 3.0, 4.0}
    assert scraper.values("ray_rayrl_eval_cider_d") <= {r.get("eval/cider_d") for r in rows}
    assert scraper.values("ray_rayrl_workers", 'state="rollout"') == {1.0}
    assert scraper.values("ray_rayrl_phase_seconds", 'phase="sync"')
    assert scraper.values("ray_rayrl_staleness_max") == {0.0}
    # The token stays out of everything that a run leaves behind.
    texts = [done.stdout, done.stderr]
    texts += [f.read_bytes().decode(errors="replace") for f in tmp_path.rglob("*") if f.is_file()]
    assert not any(cluster["RAY_AUTH_TOKEN"] in text for text in texts)


@pytest.mark.parametrize(
    "credentials",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    ],
    ids=["none", "wrong"],
)
def test_without_the_token_a_job_is_refused(cluster, small_job, tmp_path, credentials):
    stranger = {k: v for k, v in cluster.items() if not k.startswith("RAY_AUTH")} | credentials
    done = submit(small_job(), stranger)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "401" in said or "403" in said or "uthentication" in said, said
    assert cluster["RAY_AUTH_TOKEN"] not in said
    assert not (tmp_path / "run").exists()


def test_a_failing_job_exits_non_zero_with_its_reason_in_the_last_lines(cluster, small_job):
    done = submit(small_job(data__source="parquet", data__path="{split}/nowhere.parquet"), cluster)
    assert done.returncode != 0
    last = "\n".join(done.stdout.strip().splitlines()[-12:])
    assert "grpo_coco.py: failed:" in last and "nowhere.parquet" in last
