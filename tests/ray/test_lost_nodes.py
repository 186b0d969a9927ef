"""Machines that go away with the workers on them, and come back."""

from __future__ import annotations

import tempfile

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.ray.conftest import ROOT
from tests.ray.fake_run import STEPS, Saboteur, assert_same, run

pytestmark = pytest.mark.ray
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster(monkeypatch):
    """A head and two machines for workers."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="rayrl-", dir="/tmp") as faults:
        head = {
            "num_cpus": 1,
            "resources": {"head": 1},
            "object_store_memory": 100 * 2**20,
            "include_dashboard": False,
        }
        machines = Cluster(initialize_head=True, head_node_args=head)
        nodes = [machines.add_node(**NODE) for _ in range(2)]
        ray.init(
            address=machines.address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "RAYRL_TEST_FAULTS": faults}},
        )
        yield machines, nodes
        ray.shutdown()
        machines.shutdown()


@pytest.mark.parametrize("staleness", [0, 1])
def test_machines_that_go_away_change_nothing(cluster, tmp_path, monkeypatch, staleness):
    machines, nodes = cluster
    options = {
        "learner_options": {"resources": {"head": 0.1}},
        "num_workers": 2,
        "cpus": 1.0,
        "staleness": staleness,
    }
    quiet = run(tmp_path / "quiet", monkeypatch, **options)

    def lose(chance) -> bool:
        node = nodes.pop(chance.randrange(len(nodes)))
        machines.remove_node(node, allow_graceful=False)
        return True

    saboteur = Saboteur(lose, seed=staleness)

    def after(step: int, metrics: object) -> None:
        if step % 5 == 0:
            # One at a time, or no machine would be left.
            saboteur.join()
            if len(nodes) < 2:
                nodes.append(machines.add_node(**NODE))
            saboteur(step)

    disturbed = run(tmp_path / "disturbed", monkeypatch, after=after, **options)
    assert saboteur.join() == STEPS // 5
    assert_same(disturbed, quiet)
