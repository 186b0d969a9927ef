"""Weights that do not fit into the object store together: Ray spills them, and the run goes on."""

from __future__ import annotations

import pytest
import ray

from tests.ray.conftest import ROOT
from tests.ray.fake_run import assert_same, run

pytestmark = pytest.mark.ray
STORE_MB, WEIGHTS_MB = 80, 30


def test_a_full_object_store_changes_nothing(no_ray, faults_folder, tmp_path, monkeypatch):
    environment = {"PYTHONPATH": str(ROOT), "RAYRL_TEST_FAULTS": str(faults_folder)}
    spilled = tmp_path / "spilled"
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=STORE_MB * 2**20,
        object_spilling_directory=str(spilled),
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    done = []
    for megabytes in (0, WEIGHTS_MB):
        ballast = {"env_vars": {"RAYRL_TEST_BALLAST_MB": str(megabytes)}}
        options = {"staleness": 1, "steps": 8, "num_workers": 2}
        options["learner_options"] = {"runtime_env": ballast}
        done.append(run(tmp_path / str(megabytes), monkeypatch, **options))
        # The first version, whole, and two or three later ones are more than the store holds.
        assert any(file.is_file() for file in spilled.rglob("*")) == bool(megabytes)
    light, heavy = done
    assert_same(heavy, light)
