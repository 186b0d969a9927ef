"""Every way in which Ray says that a worker is gone costs that worker, and not the run."""

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from rayrl.actors import pool, reward
from rayrl.actors.history import History
from rayrl.actors.learner_group import LearnerGroup, RankLost
from rayrl.actors.losses import LOST
from rayrl.actors.pool import Pool, PoolSize, RestartBudget, TooFewWorkers, TooManyLost
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
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), RankLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `gemm`"), RankLost),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), RankLost),
        (torch.AcceleratorError("CUDA error: out of memory"), RayTaskError),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `create`"),
            RayTaskError,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"), RayTaskError),
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


def unconstructed() -> RayActorError:
    return RayActorError(None, "the constructor raised", True)


def test_a_constructor_that_raises_ends_the_run_unless_another_one_could(monkeypatch):
    """The first says that nobody can be constructed, a later one that something is wrong with a
    node."""
    error = unconstructed()
    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    Due(monkeypatch, [error])
    with pytest.raises(RayActorError) as raised:
        Pool("worker", actor, size, RestartBudget(9)).wait()
    assert raised.value is error
    ray = Due(monkeypatch, [None, error, None])
    workers = Pool("worker", actor, size, RestartBudget(2))
    (first,) = workers.wait()
    workers.lost(first, KILLED)
    (third,) = workers.wait()
    assert (third.number, workers._budget.spent, len(ray.killed)) == (2, 2, 2)


def test_a_rank_that_cannot_be_constructed_is_a_loss_once_the_group_was(monkeypatch):
    group = object.__new__(LearnerGroup)
    group._ranks, group._one_could = ["rank 0"], False
    with pytest.raises(RayActorError):
        group._raise({0: unconstructed()}, silent=[])
    group._one_could = True
    with pytest.raises(RankLost):
        group._raise({0: unconstructed()}, silent=[])


LOST_WEIGHTS = ObjectLostError("ab" * 28, None, "")


class Due:
    """Stands for Ray: what workers must have done fails as ``errors`` says, and is there."""

    def __init__(self, monkeypatch, errors) -> None:
        self.errors, self.killed = iter(errors), []
        monkeypatch.setattr(pool.ray, "kill", self.killed.append)
        monkeypatch.setattr(pool.ray, "wait", lambda refs, timeout: (refs, []))
        monkeypatch.setattr(pool.ray, "get", self._get)

    def _get(self, ref):
        if (error := next(self.errors, None)) is not None:
            raise error


@pytest.mark.parametrize("losses", [1, 4, 5])
def test_a_worker_whose_weights_were_lost_is_given_them_again_and_costs_nothing(
    monkeypatch, losses
):
    ray, prepared = Due(monkeypatch, [None] + [LOST_WEIGHTS] * losses), []

    def prepare(actor, lost):
        prepared.append(lost)
        return "weights"

    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(1), prepare=prepare)
    (ready,) = workers.wait()
    again = min(losses, 4)
    assert prepared == [None] + [LOST_WEIGHTS] * again + [None] * (losses > 4)
    # It is not tried for ever.
    assert workers._budget.spent == len(ray.killed) == (losses > 4)
    assert (ready.number, ready.renewed) == (int(losses > 4), 0)


def test_a_worker_whose_constructor_lost_its_arguments_is_replaced_while_the_budget_lasts(
    monkeypatch,
):
    Due(monkeypatch, itertools.repeat(LOST_WEIGHTS))
    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(2))
    with pytest.raises(TooManyLost, match="3 workers were lost"):
        workers.wait()


def test_a_node_that_goes_with_a_workers_results_is_one_loss(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(pool.time, "monotonic", lambda: float(next(clock)))
    ray = Due(monkeypatch, [])
    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(9))
    (worker,) = workers.wait()
    now = next(clock)
    for _ in range(4):
        workers.lost(worker, LOST_WEIGHTS, sent=now)
    assert (workers._budget.spent, ray.killed) == (1, [])
    # Then Ray notices that the worker went too.
    workers.lost(worker, KILLED, sent=next(clock))
    assert (workers._budget.spent, len(ray.killed)) == (1, 1)
    # Results that are lost again and again have a limit, whoever made them.
    (second,) = workers.wait()
    for count in (2, 3):
        workers.lost(second, LOST_WEIGHTS, sent=next(clock))
        assert workers._budget.spent == count


def test_a_pool_that_is_asked_to_stop_waits_for_nobody(monkeypatch):
    Due(monkeypatch, [])
    monkeypatch.setattr(pool.ray, "wait", lambda refs, timeout: ([], refs))
    monkeypatch.setattr(pool.Pool, "_situation", lambda self: "0 workers are ready")
    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(0))
    workers.stop.requested = True
    with pytest.raises(TooFewWorkers, match="0 workers are ready; asked to stop meanwhile"):
        workers.wait()


def test_how_long_a_worker_has_been_starting_counts_from_its_own_beginning(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pool.time, "monotonic", lambda: clock.now)
    Due(monkeypatch, [])
    size = PoolSize(wanted=2, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(1), prepare=lambda actor, lost: "weights")
    clock.now = 5.0
    assert workers.longest_start_s == 5.0
    first, _ = workers.wait()
    clock.now = 100.0
    assert workers.longest_start_s == 0.0
    workers.renew(first, LOST_WEIGHTS)
    clock.now = 103.0
    assert workers.longest_start_s == 3.0


def test_a_pool_that_does_not_begin_at_once_begins_when_it_is_waited_for(monkeypatch):
    Due(monkeypatch, [])
    size = PoolSize(wanted=2, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(0), begin=False)
    assert workers.admit() == []
    assert len(workers.wait()) == 2


def test_what_a_renewed_worker_was_asked_for_before_is_nobodys_loss(monkeypatch):
    ray = Due(monkeypatch, [])
    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(0), prepare=lambda actor, lost: "weights")
    (before,) = workers.wait()
    workers.renew(before, LOST_WEIGHTS)
    assert before not in workers.constructed
    workers.lost(before, KILLED)
    (after,) = workers.wait()
    assert after is not before and after.actor is before.actor
    assert (workers._budget.spent, ray.killed) == (0, [])


def test_a_worker_that_is_replaced_while_its_weights_are_made_again_is_not_prepared_twice(
    monkeypatch,
):
    ray = Due(monkeypatch, [])
    size = PoolSize(wanted=1, minimum=1, deadline_s=60.0, asked={})
    workers = Pool("worker", actor, size, RestartBudget(1))
    (before,) = workers.wait()

    def prepare(made, lost):
        if lost is not None:
            workers.lost(before, KILLED)

    workers._prepare = prepare
    workers.renew(before, LOST_WEIGHTS)
    assert len(ray.killed) == 1
    (after,) = workers.wait()
    assert (after.number, workers.constructed) == (1, [after])


def test_the_learner_is_not_lost_once_more_by_an_engine_that_comes_back():
    group = object.__new__(LearnerGroup)
    group._history = History(back=0)
    group._budget = RestartBudget(1)
    group._kill = group._wait_until_built = lambda: None
    group.lost = True
    rebuilt = []

    @contextmanager
    def alone():
        rebuilt.append("learner")
        yield
        group.weights(trained_only=True)

    group.alone = alone
    group._call = lambda *arguments, **options: "weights"
    assert group.weights(trained_only=True) == "weights"
    assert rebuilt == ["learner"]


def test_the_first_cause_holds_nothing_of_where_it_was_raised():
    """Gigabytes of a checkpoint, which were on their way when the learner was lost."""
    budget, alive = RestartBudget(1), []

    class Held:
        pass

    def fail():
        held = Held()
        alive.append(weakref.ref(held))
        raise ObjectLostError("ab" * 28, None, "")

    for _ in range(2):
        try:
            fail()
        except ObjectLostError as error:
            if alive[1:]:
                with pytest.raises(TooManyLost, match="the first cause"):
                    budget.spend("a learner is rebuilt", error)
            else:
                budget.spend("a learner is rebuilt", error)
    gc.collect()
    assert alive[0]() is None
