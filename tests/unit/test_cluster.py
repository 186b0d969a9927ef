"""What workers are started with."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rayrl.actors import cluster
from rayrl.actors.cluster import worker_environment


def variables(cpus: float, gpus: float = 0.0) -> dict[str, str]:
    return worker_environment(cpus, gpus)["env_vars"]


def test_a_worker_that_asks_for_no_gpu_sees_none():
    assert variables(1.0)["CUDA_VISIBLE_DEVICES"] == ""
    # Ray says which ones where it asks for some.
    assert "CUDA_VISIBLE_DEVICES" not in variables(1.0, 0.5)


@pytest.mark.parametrize(("cpus", "threads"), [(0.25, "1"), (1.0, "1"), (2.5, "2"), (8.0, "8")])
def test_a_worker_has_a_thread_for_every_whole_core(cpus, threads):
    assert variables(cpus)["OMP_NUM_THREADS"] == threads


def test_how_long_threads_stay_awake_is_the_users_to_say(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert variables(1.0)["GOMP_SPINCOUNT"] == "2000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert variables(1.0)["GOMP_SPINCOUNT"] == "7"


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's threads are LLVM's here")
def test_the_threads_of_pytorch_obey(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1234")
    # GNU OpenMP says what it reads when it is loaded.
    environment = {**os.environ, **variables(1.0), "OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert "GOMP_SPINCOUNT = '1234'" in done.stderr


@pytest.fixture
def joined(monkeypatch, caplog):
    """What is said where a run of so many CPUs and GPUs joins a cluster of these resources."""

    def said(has: dict[str, float], cpus: float, gpus: float | None) -> list[str]:
        fake = SimpleNamespace(
            is_initialized=lambda: False,
            init=lambda **options: None,
            cluster_resources=lambda: has,
        )
        monkeypatch.setattr(cluster, "ray", fake)
        monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
        caplog.clear()
        assert not cluster.connect(cpus, gpus)
        return caplog.messages

    return said


@pytest.mark.parametrize(("num_gpus", "spoken_of"), [(0.0, True), (1.0, False), (None, False)])
def test_gpus_that_a_run_does_not_ask_for_are_spoken_of(joined, num_gpus, spoken_of):
    said = joined({"CPU": 1.0, "GPU": 2.0}, 1.0, num_gpus)
    assert [text.startswith("Ray has 2 GPUs here, and the run asks for none") for text in said] == (
        [True] if spoken_of else []
    )


def test_what_a_cluster_lacks_is_said_before_the_run_begins(joined):
    assert joined({"CPU": 4.0}, 4.0, 0.0) == []
    more = "unless more come, some of it will wait for room"
    assert joined({"CPU": 4.0}, 4.25, 2.0) == [
        f"the run asks for 4.25 CPUs, and Ray has 4 here: {more}",
        f"the run asks for 2 GPUs, and Ray has 0 here: {more}",
    ]
    # What never computes on GPUs takes any number of CPUs.
    assert joined({"CPU": 1.0}, 4.25, None) == []


@pytest.mark.parametrize(("cpus", "said"), [(8.0, 0), (8.5, 1)])
def test_many_more_workers_than_a_machine_has_cores_are_spoken_of(monkeypatch, caplog, cpus, said):
    fake = SimpleNamespace(
        is_initialized=lambda: False, init=lambda **options: None, cluster_resources=dict
    )
    monkeypatch.setattr(cluster, "ray", fake)
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.connect(cpus, 0.0)
    assert caplog.text.count("this machine has 2: its workers will take turns") == said
