"""Machines that go away with the workers on them, and come back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.ray.fake_run import STEPS, assert_same, run, undisturbed
from tests.ray.fakes import BALLAST_MB
from tests.ray.fault_kinds import NO_GPU, ON_HEAD, WITH_GPU, Machines, Saboteur

pytestmark = pytest.mark.ray


@pytest.fixture
def start(monkeypatch):
    """Starts :class:`Machines`, and weights that lie in their object stores and in no message."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    clusters = []

    def begin(**options):
        (Path(faults) / BALLAST_MB).write_text("1")
        clusters.append(Machines(Path(faults), **options))
        return clusters[-1]

    with tempfile.TemporaryDirectory(prefix="rayrl-", dir="/tmp") as faults:
        yield begin
        for cluster in clusters:
            cluster.shutdown()


@pytest.mark.parametrize("staleness", [0, 1])
def test_machines_that_go_away_change_nothing(start, tmp_path, monkeypatch, staleness):
    machines = start()
    options = {"learner": ON_HEAD, "num_workers": 2, "cpus": 1.0, "staleness": staleness}
    quiet = undisturbed(staleness)
    saboteur = Saboteur(machines.lose, seed=staleness)

    def after(step: int, metrics: object) -> None:
        if step % 5 == 0:
            # One at a time, or no machine would be left.
            saboteur.join()
            machines.complete()
            saboteur(step)

    disturbed = run(tmp_path, monkeypatch, after=after, **options)
    assert saboteur.join() == STEPS // 5
    assert_same(disturbed, quiet)


def test_the_machine_of_the_learner_and_all_engines_that_goes_away_changes_nothing(
    start, tmp_path, monkeypatch
):
    """All weights are lost with it, those of two versions."""
    machines = start(count=1, head=NO_GPU, node=WITH_GPU)
    sizes = {"num_workers": 2, "min_workers": 1, "cpus": 2.0, "max_restarts": 6}
    options = {"learner": {"gpus": 1, "cpus": 0.1}, "staleness": 1, **sizes}
    quiet = undisturbed(1)
    saboteur = Saboteur(machines.lose_learner, seed=1, faults=1, every=5)

    def after(step: int, metrics: object) -> None:
        if step == 1:
            # The one that takes its place.
            machines.add()
        saboteur(step)

    disturbed = run(tmp_path, monkeypatch, after=after, **options)
    assert saboteur.join() == 1
    assert_same(disturbed, quiet)
    # Ray may put one once more where the machine was that it does not miss yet.
    assert 2 <= disturbed.rows[-1]["workers/replaced"] <= 6
