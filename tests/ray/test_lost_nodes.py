"""Machines that go away with the workers on them, and come back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.ray.fake_run import STEPS, assert_same, run
from tests.ray.fault_kinds import ON_HEAD, Machines, Saboteur

pytestmark = pytest.mark.ray


@pytest.fixture
def machines(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="rayrl-", dir="/tmp") as faults:
        cluster = Machines(Path(faults))
        yield cluster
        cluster.shutdown()


@pytest.mark.parametrize("staleness", [0, 1])
def test_machines_that_go_away_change_nothing(machines, tmp_path, monkeypatch, staleness):
    options = {"learner": ON_HEAD, "num_workers": 2, "cpus": 1.0, "staleness": staleness}
    quiet = run(tmp_path / "quiet", monkeypatch, **options)
    saboteur = Saboteur(machines.lose, seed=staleness)

    def after(step: int, metrics: object) -> None:
        if step % 5 == 0:
            # One at a time, or no machine would be left.
            saboteur.join()
            machines.complete()
            saboteur(step)

    disturbed = run(tmp_path / "disturbed", monkeypatch, after=after, **options)
    assert saboteur.join() == STEPS // 5
    assert_same(disturbed, quiet)
