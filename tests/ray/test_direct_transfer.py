"""The learner sends weights to engines over gloo; one dies in the middle of it.

Driver, pools, group and transport are the real ones; learner and engines only hold a few values.
"""

from __future__ import annotations

import pytest
import ray

from rayrl.actors import learner_group, workers
from rayrl.actors.fleet import Fleet
from rayrl.actors.learner_group import LearnerGroup
from rayrl.actors.pool import RestartBudget
from rayrl.config import Config
from rayrl.rewards.statistics import reward_statistics
from tests.ray.conftest import ROOT
from tests.ray.transfer_ends import Holder, Sender, Somewhere

pytestmark = pytest.mark.ray


class OneSender:
    """What a transfer uses of a LearnerGroup."""

    place = shared_place = None

    def __init__(self):
        self.first, self.version, self.packed = Sender.remote(), 0, 0

    def stage(self, *, trained_only):
        assert trained_only
        ray.get(self.first.stage.remote(self.version))

    def weights(self, *, trained_only):
        self.packed += 1
        return self.first.weights.remote(self.version, ["trained"] if trained_only else None)


@pytest.fixture(scope="module")
def die(tmp_path_factory):
    """A local Ray; the file, where there is one, at which an engine dies that receives."""
    file = tmp_path_factory.mktemp("transfer") / "die"
    variables = {"PYTHONPATH": str(ROOT), "RAYRL_TEST_DIE": str(file), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,  # logical ones
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    yield file
    ray.shutdown()


def test_an_engine_that_shares_the_learners_gpu_is_put_there(die, monkeypatch):
    monkeypatch.setattr(workers, "RolloutActor", Somewhere)
    monkeypatch.setattr(learner_group, "LearnerActor", Somewhere)
    config = Config.model_validate(
        {
            "rollout": {"colocate": True, "gpus": 0.25, "cpus": 0.5},
            "learner": {"gpus": 0.25, "cpus": 0.5},
            "xe": {"control": False},
        }
    )
    # By itself Ray would put an engine of a quarter beside this one.
    other = Somewhere.options(num_gpus=0.5).remote()
    assert ray.get(other.gpus.remote()) == [0]
    group = LearnerGroup(config, {}, RestartBudget(0))
    pool = workers.rollout_pool(
        config, None, RestartBudget(0), lambda actor, lost: None, place=group.shared_place
    )
    try:
        (engine,) = pool.wait()
        assert ray.get([group.first.gpus.remote(), engine.actor.gpus.remote()]) == [[1], [1]]
    finally:
        pool.shutdown()
        group.shutdown()
        ray.kill(other)


def test_a_transfer_that_loses_an_engine_falls_back_to_pulls_and_the_next_one_works(
    die, monkeypatch, caplog
):
    monkeypatch.setattr(workers, "RolloutActor", Holder)
    rollout = {"num_workers": 2, "cpus": 0.1, "sync": "gloo", "sync_timeout_s": 8.0}
    config = Config.model_validate({"rollout": rollout, "train": {"reward_cpus": 0.1}})
    statistics = reward_statistics([["a picture"], ["another one"]], config.reward)
    learner, budget = OneSender(), RestartBudget(2)
    fleet = Fleet(config, {}, statistics, budget, greedy_baseline=False, learner=learner)

    def publish(version) -> bool:
        """As the driver does; returns whether the version was sent."""
        learner.version = version
        sent = fleet.send(version, learner)
        if not sent:
            fleet.publish(version, learner.weights(trained_only=True))
        fleet.confirm(version)
        fleet.wait()  # for the one that takes the place of a lost one
        actors = [actor for name, actor in fleet.workers().items() if "rollout" in name]
        want = {"frozen": 10.0, "trained": 2100.0 * version}
        assert ray.get([actor.held.remote() for actor in actors]) == [(version, want)] * 2
        return sent

    fleet.wait()
    first = learner.weights(trained_only=False)
    fleet.publish(0, learner.weights(trained_only=True), frozen=first)
    fleet.confirm(0)
    packed = learner.packed
    assert publish(1) and publish(2)
    # Nothing went through the object store.
    assert learner.packed == packed
    die.touch()
    assert not publish(3)
    assert "version 3 did not go through gloo: " in caplog.text
    assert "engines pull it and no other" in caplog.text
    assert budget.spent == 1 and not die.exists()
    assert fleet.gauges([])["sync/fallbacks"] == 1
    # With the worker that took the place of the lost one.
    assert publish(4)
    assert fleet.gauges([])["sync/fallbacks"] == 1
    fleet.shutdown()
