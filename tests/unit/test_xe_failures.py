"""Which failures of stage 1's workers another worker would mend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from ray.train import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from rayrl.actors.train_failures import failures_of, first_loss, own_failure

DIED = ActorDiedError()
DEAD = WorkerHealthCheckFailedError("no answer", DIED)
LONELY = RuntimeError("[pair.cc:553] gloo: Connection closed by peer")
TOO_SMALL = torch.OutOfMemoryError("CUDA out of memory")
READER = RayTaskError("map", "OSError: gone", UserCodeException("gone")).as_instanceof_cause()
UNREADABLE = ActorDiedError(RayTaskError("_Rows.__init__", "OSError: no such file", OSError()))
BROKEN = RuntimeError("CUDA error: uncorrectable ECC error encountered")
LATE = WorkerGroupStartupTimeoutError(num_workers=2)


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("gone"), TOO_SMALL, READER])
def test_what_a_worker_or_its_reader_raised_comes_again(error):
    assert own_failure([error]) is error
    assert own_failure([LONELY, error]) is error
    assert own_failure(failures_of(ControllerError(error))) is error


def test_a_reader_that_cannot_be_made_is_no_loss():
    assert own_failure([UNREADABLE]) is UNREADABLE


@pytest.mark.parametrize(
    "failures",
    [[DEAD], [DIED], [LONELY], [LONELY, DEAD], [ValueError("torn"), DEAD], [BROKEN], [LATE]],
)
def test_what_follows_from_a_loss_does_not(failures):
    assert own_failure(failures) is None


def test_a_machine_that_is_taken_away_leaves_no_failure_of_a_worker():
    error = PreemptionError(SimpleNamespace(preempted_ranks=[0]))
    assert own_failure(failures_of(error)) is None and first_loss(error) is error


def test_the_cause_that_is_told_is_the_loss_and_not_what_followed():
    assert first_loss(WorkerGroupError("both", {0: LONELY, 1: DEAD})) is DIED
    assert first_loss(WorkerGroupError("one", {0: LONELY})) is LONELY
    assert first_loss(ControllerError(LATE)) is LATE
