"""Weights that do not fit into the object store together: Ray spills them, and the run goes on."""

from __future__ import annotations

import pytest
import ray

from tests.ray.conftest import ROOT
from tests.ray.fake_run import assert_same, run

pytestmark = pytest.mark.ray
STORE_MB, WEIGHTS_MB = 80, 30


def test_a_full_object_store_changes_nothing(tmp_path, monkeypatch):
    done = {}
    for name, ballast in (("light", 0), ("heavy", WEIGHTS_MB)):
        faults, spilled = tmp_path / f"faults-{name}", tmp_path / f"spilled-{name}"
        faults.mkdir()
        environment = {
            "PYTHONPATH": str(ROOT),
            "RAYRL_TEST_FAULTS": str(faults),
            "RAYRL_TEST_BALLAST_MB": str(ballast),
        }
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=STORE_MB * 2**20,
            object_spilling_directory=str(spilled),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": environment},
        )
        try:
            options = {"staleness": 1, "steps": 8, "num_workers": 2}
            done[name] = run(tmp_path / name, monkeypatch, **options)
            # The first version, whole, and two or three later ones are more than the store holds.
            assert any(file.is_file() for file in spilled.rglob("*")) == bool(ballast)
        finally:
            ray.shutdown()
    assert_same(done["heavy"], done["light"])
