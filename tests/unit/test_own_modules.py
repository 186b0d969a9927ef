"""Rewards and objectives of the user's own are found where README says, by driver and workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rayrl.actors import cluster
from rayrl.own_modules import find_here, import_path

ROOT = Path(__file__).resolve().parents[2]


def test_workers_get_rayrl_first_and_then_what_the_driver_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["mine", "", "/elsewhere", str(ROOT), "mine"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(given))
    want = [str(ROOT), str(tmp_path / "mine"), "/elsewhere"]
    assert import_path().split(os.pathsep) == want
    options = {}
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda **given: options.update(given),
        cluster_resources=dict,
    )
    monkeypatch.setattr(cluster, "ray", fake)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect(1.0)
    assert options["runtime_env"]["env_vars"]["PYTHONPATH"].split(os.pathsep) == want


def test_without_a_pythonpath_workers_get_rayrl(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert import_path() == str(ROOT)


def test_the_current_folder_comes_last_and_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/a"])
    find_here()
    find_here()
    assert sys.path == ["/a", str(tmp_path)]


@pytest.mark.parametrize(
    ("place", "flags", "name"),
    [
        ("started_from", ["--objective.set", "advantage=my_part:doubled"], "grpo"),
        ("on_the_path", ["--objective.preset", "my_part:plan"], "my_part:plan"),
    ],
)
def test_a_job_finds_an_objective_of_ones_own(tmp_path, place, flags, name):
    folder = tmp_path / place
    folder.mkdir()
    (folder / "my_part.py").write_text(
        "from rayrl.objectives import Plan, part\n"
        "def doubled(rewards, valid):\n    return 2 * (rewards - rewards.mean(1, keepdim=True))\n"
        "plan = Plan(advantage=(part(doubled),), surrogate=part('reinforce'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder) if place == "on_the_path" else ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/grpo_coco.py"), "--dry-run", *flags],
        cwd=folder if place == "started_from" else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"objective: {name}\n" in done.stdout
