"""Every way in which Ray says that a worker is gone costs that worker, and not the run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, RuntimeEnvSetupError

from rayrl.actors import pool, reward
from rayrl.actors.learner_group import LearnerGroup, RankLost
from rayrl.actors.losses import LOST
from rayrl.actors.pool import Pool, PoolSize, RestartBudget, TooManyLost
from rayrl.rewards.term import Failure

KILLED = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")
GONE = [KILLED, RuntimeEnvSetupError("the node died"), RayActorError()]
gone = pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)


def actor() -> SimpleNamespace:
    return SimpleNamespace(started=SimpleNamespace(remote=lambda: "due"))


@gone
def test_a_pool_replaces_the_worker_while_its_budget_lasts(monkeypatch, error):
    killed = []
    monkeypatch.setattr(pool.ray, "kill", killed.append)
    size = PoolSize(wanted=1, minimum=1, deadline_s=1.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(1))
    first = workers._starting[0]
    assert isinstance(error, LOST)
    workers.lost(first, error)
    assert killed == [first.actor]
    (second,) = workers._starting
    assert (second.number, workers._budget.spent) == (1, 1)
    with pytest.raises(TooManyLost) as raised:
        workers.lost(second, error)
    assert raised.value.__cause__ is error


@gone
def test_the_learner_is_rebuilt(error):
    group = object.__new__(LearnerGroup)
    group._ranks = ["rank 0", "rank 1"]
    with pytest.raises(RankLost, match="learner rank 1 of 2 died: ") as raised:
        group._raise({1: error}, silent=[0])
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    ("cause", "blamed"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), RankLost),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), RankLost),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RayTaskError),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b"), RayTaskError),
        (ValueError("prompt a/0: the engine used other prompt ids"), RayTaskError),
    ],
)
def test_a_rank_that_fails_by_itself_is_not_taken_for_one_that_waits(cause, blamed):
    """The others wait for it in the middle of a sum, and do not answer either way."""
    group = object.__new__(LearnerGroup)
    group._ranks = ["rank 0", "rank 1"]
    error = RayTaskError("update", "trace", cause).as_instanceof_cause()
    with pytest.raises(blamed):
        group._raise({1: error}, silent=[0])


@gone
def test_a_term_in_its_own_actor_is_tried_again(monkeypatch, error):
    def get(ref, timeout):
        raise error

    monkeypatch.setattr(reward.ray, "get", get)
    term = object.__new__(reward._TermApart)
    term._answer = "ref"
    assert term.answer(deadline=0.0) == Failure("its actor died")
