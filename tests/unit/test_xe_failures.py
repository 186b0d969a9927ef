"""Which failures of stage 1's workers another worker would mend."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from rayrl.xe import own_failure

DEAD = WorkerHealthCheckFailedError("no answer", ActorDiedError())
LONELY = RuntimeError("[pair.cc:553] gloo: Connection closed by peer")
TOO_SMALL = torch.OutOfMemoryError("CUDA out of memory")
READER = RayTaskError("map", "OSError: gone", UserCodeException("gone")).as_instanceof_cause()
BROKEN = RuntimeError("CUDA error: uncorrectable ECC error encountered")


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("gone"), TOO_SMALL, READER])
def test_what_a_worker_or_its_reader_raised_comes_again(error):
    assert own_failure({0: error}) is error
    assert own_failure({0: LONELY, 1: error}) is error


@pytest.mark.parametrize(
    "failures",
    [{0: DEAD}, {0: LONELY}, {0: LONELY, 1: DEAD}, {0: ValueError("torn"), 1: DEAD}, {0: BROKEN}],
)
def test_what_follows_from_a_loss_does_not(failures):
    assert own_failure(failures) is None


def test_a_machine_that_is_taken_away_leaves_no_failure_of_a_worker():
    assert own_failure({}) is None
