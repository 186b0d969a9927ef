"""Weights that do not fit into the object store together: Ray spills them, and the run goes on."""

from __future__ import annotations

import pytest

from tests.ray.fake_run import assert_same, run
from tests.ray.fakes import BALLAST_MB
from tests.ray.fault_kinds import local_ray

pytestmark = pytest.mark.ray
STORE_MB, WEIGHTS_MB = 80, 30


def test_a_full_object_store_changes_nothing(no_ray, faults_folder, tmp_path, monkeypatch):
    spilled = tmp_path / "spilled"
    store = {"num_cpus": 4, "object_store_memory": STORE_MB * 2**20}
    done = []
    with local_ray(faults_folder, **store, object_spilling_directory=str(spilled)):
        for megabytes in (0, WEIGHTS_MB):
            (faults_folder / BALLAST_MB).write_text(str(megabytes))
            options = {"staleness": 1, "steps": 8, "num_workers": 2}
            done.append(run(tmp_path / str(megabytes), monkeypatch, **options))
            # The first version, whole, and two or three later ones are more than the store holds.
            assert any(file.is_file() for file in spilled.rglob("*")) == bool(megabytes)
    light, heavy = done
    assert_same(heavy, light)
